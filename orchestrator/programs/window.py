"""How far to send the hosts ahead, and how long to wait for them. Pure."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW_S = 1.0  # two windows are in flight: long enough to hide the controller, short enough to stop soon
MOST_STEPS = 200
STALL = 10  # times the longest step: a pause this long is not a hang
RECENT = 100  # latest units (steps, evaluations): their longest sets the deadline; one slow step drops out
BACKOFF_S, LONGEST_BACKOFF_S = 5.0, 300.0  # after a save has failed
SLOWDOWN = 3  # a window this many times slower than its longest step is no hang


@dataclass
class Pace:
    """Seconds that units of work took lately, by kind of call: a step of `run`, a whole `evaluate`."""

    recent: dict[str, deque[float]] = field(default_factory=dict)
    usual: dict[str, float] = field(default_factory=dict)  # the median of the newest answer


def learn(pace: Pace, kind: str, seconds: Sequence[float]) -> None:
    """One answer's units, each with the seconds that it took."""
    if seconds:
        pace.recent.setdefault(kind, deque(maxlen=RECENT)).extend(seconds)
        pace.usual[kind] = sorted(seconds)[len(seconds) // 2]


def deadline_of(pace: Pace, kind: str, unknown_s: float, least_s: float, units: int) -> float:
    """Seconds after which a call of so many units hangs. unknown_s: where no such call has come back yet."""
    return deadline_s(unknown_s, least_s, max(pace.recent.get(kind, ()), default=None), units)


def window_end(first: int, end: int, step_s: float | None, stops: tuple[int, ...]) -> int:
    """The step at which the window that begins at `first` ends: after about WINDOW_S, at `end` at the latest.

    step_s: a step's usual seconds; None where not known yet (a window of one step then).
    stops: intervals (checkpoint.every, eval.every; 0 is off) whose multiples a window must not cross.
    """
    length = 1 if step_s is None else max(1, min(MOST_STEPS, round(WINDOW_S / step_s)))
    ends = [first + length, end] + [(first // every + 1) * every for every in stops if every]
    return min(ends)


def deadline_s(unknown_s: float, least_s: float, longest_s: float | None, units: int) -> float:
    """How long a call may take before it hangs, learnt from the run.

    longest_s: of a unit lately; None where none was seen, and unknown_s holds. least_s: a host may stall for so long.
    """
    if longest_s is None:
        return unknown_s
    return max(least_s, STALL * longest_s) + SLOWDOWN * longest_s * units


def backoff_s(failures: int) -> float:
    """How long after so many failed saves in a row the next is tried."""
    return min(LONGEST_BACKOFF_S, BACKOFF_S * 2.0 ** min(failures - 1, 32))


def warned(failures: int) -> bool:
    """Whether to print this one of many failures in a row: the first, and each time they have doubled."""
    return failures & (failures - 1) == 0


def due(step: int, end: int, every: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return step == end or (every > 0 and step % every == 0)


def snapshot_every(cost_s: float, step_s: float, cost: float) -> int:
    """Steps from one snapshot to the next, so that they cost at most a share `cost` of the time.

    cost_s: that one holds training up.
    """
    return max(1, math.ceil(cost_s / (cost * max(step_s, 1e-6))))
