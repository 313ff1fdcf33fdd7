"""How far to send the hosts ahead. Pure."""

WINDOW_S = 1.0  # two windows are in flight: long enough to hide the controller, short enough to stop soon
MOST_STEPS = 200


def window_end(first: int, end: int, step_s: float | None, stops: tuple[int, ...]) -> int:
    """The step at which the window that begins at `first` ends: after about WINDOW_S, at `end` at the latest.

    step_s: a step's usual seconds; None where not known yet (a window of one step then).
    stops: intervals (checkpoint.every, eval.every; 0 is off) whose multiples a window must not cross.
    """
    length = 1 if step_s is None else max(1, min(MOST_STEPS, round(WINDOW_S / step_s)))
    ends = [first + length, end] + [(first // every + 1) * every for every in stops if every]
    return min(ends)


def due(step: int, end: int, every: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return step == end or (every > 0 and step % every == 0)
