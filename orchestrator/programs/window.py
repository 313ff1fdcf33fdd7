"""How far to send the hosts ahead. Pure."""

import math

WINDOW_S = 1.0  # two windows are in flight: long enough to hide the controller, short enough to stop soon
MOST_STEPS = 200
STALL = 10  # of the longest step: that something may stand still without being a hang
BACKOFF_S, LONGEST_BACKOFF_S = 5.0, 300.0  # after a save has failed
SLOWDOWN = 3  # a window so many times slower than its longest steps is not a hang


def window_end(first: int, end: int, step_s: float | None, stops: tuple[int, ...]) -> int:
    """The step at which the window that begins at `first` ends: after about WINDOW_S, at `end` at the latest.

    step_s: a step's usual seconds; None where not known yet (a window of one step then).
    stops: intervals (checkpoint.every, eval.every; 0 is off) whose multiples a window must not cross.
    """
    length = 1 if step_s is None else max(1, min(MOST_STEPS, round(WINDOW_S / step_s)))
    ends = [first + length, end] + [(first // every + 1) * every for every in stops if every]
    return min(ends)


def deadline_s(unknown_s: float, least_s: float, longest_s: float | None, steps: int) -> float:
    """How long a window may take before it is a hang, learnt from the run.

    longest_s: of a step so far; None where none was seen, and unknown_s holds. least_s: a host may stall for so long.
    """
    if longest_s is None:
        return unknown_s
    return max(least_s, STALL * longest_s) + SLOWDOWN * longest_s * steps


def backoff_s(failures: int) -> float:
    """How long after so many failed saves in a row the next is tried."""
    return min(LONGEST_BACKOFF_S, BACKOFF_S * 2.0 ** min(failures - 1, 32))


def warned(failures: int) -> bool:
    """Whether the user is told of this one of many failures in a row: the first, and each time they have doubled."""
    return failures & (failures - 1) == 0


def due(step: int, end: int, every: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return step == end or (every > 0 and step % every == 0)


def snapshot_every(cost_s: float, step_s: float, cost: float) -> int:
    """Steps from one snapshot to the next, so that they cost at most a share `cost` of the time.

    cost_s: that one holds training up.
    """
    return max(1, math.ceil(cost_s / (cost * max(step_s, 1e-6))))
