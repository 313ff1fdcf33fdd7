"""A measured value over steps, as SVG: what counts, what was done again, where attempts change.

However many steps there are, a column of the paper is drawn once: its mean, between its lowest and highest value.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.page.svg import WIDTH, Scale, box, drawing, figure, label, line, short, text, ticks, titled

LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 24.0, 26.0
PLOT_WIDTH = WIDTH - LEFT - RIGHT
STRIP = 4.0  # width of what answers to the pointer
DOTS = 60  # so few points are drawn as dots too
OUTLIER = 20.0  # a peak above so many times the usual range is cut off

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """points: by step, NaN where there is no value, each step once. passes: what those replaced."""

    name: str
    height: float
    points: Points
    passes: Sequence[Points] = ()
    again: Sequence[tuple[int, int]] = ()  # first and last step of those done again
    attempts: Sequence[tuple[int, int]] = ()  # attempt, the step it went on from
    evals: Points = ()
    marks: Sequence[tuple[int, str]] = ()  # step and what was wrong with it
    from_zero: bool = False
    digits: int = 4


@dataclass(frozen=True)
class Column:
    """The points that share a place on the paper."""

    first: int
    last: int
    low: float
    high: float
    mean: float
    broken: bool  # no line leads here from the column before


def columns(points: Points, x: Scale, width: float = 1.0) -> list[Column]:
    found: list[Column] = []
    here: list[float] = []
    place, first, before, hole, broken = -1, 0, 0, True, True
    per_step, finite = (x.at_high - x.at_low) / (x.high - x.low) / width, math.isfinite
    for step, value in [*points, (-1, 0.0)]:
        at = int((step - x.low) * per_step) if step >= 0 else -2
        if here and at != place:
            found.append(Column(first, before, min(here), max(here), sum(here) / len(here), broken))
            here = []
        if step < 0 or not finite(value):
            hole = True
            continue
        hole = hole or step != before + 1
        if not here:
            place, first, broken = at, step, hole
        here.append(value)
        before, hole = step, False
    return found


def runs(found: Sequence[Column]) -> Iterable[list[Column]]:
    """Columns joined by a line."""
    joined: list[Column] = []
    for column in found:
        if column.broken and joined:
            yield joined
            joined = []
        joined.append(column)
    if joined:
        yield joined


def limits(curve: Curve) -> tuple[float, float]:
    """Of the value's axis. A peak far above all else does not flatten it."""
    told = [*curve.points, *curve.evals, *(point for one in curve.passes for point in one)]
    values = sorted(value for _, value in told if math.isfinite(value))
    if not values:
        return 0.0, 1.0
    low, high = 0.0 if curve.from_zero else values[0], values[-1]
    usual = values[int(0.98 * (len(values) - 1))] - low
    if usual > 0 and high - low > OUTLIER * usual:
        high = max(value for value in values if value - low <= OUTLIER * usual)
    if high <= low:
        room = abs(high) * 0.1 or 1.0
        return (low, high + room) if curve.from_zero else (low - room, high + room)
    room = (high - low) * 0.06
    return (low if curve.from_zero else low - room), high + room


def trace(found: Sequence[Column], x: Scale, y: Scale, kind: str) -> list[str]:
    parts = []
    for joined in runs(found):
        places = [(x((c.first + c.last) / 2), c) for c in joined]
        if any(c.high > c.low for c in joined):
            edge = [f"{at:.1f} {y(c.high):.1f}" for at, c in places]
            edge += [f"{at:.1f} {y(c.low):.1f}" for at, c in reversed(places)]
            parts.append(f'<path class="{kind} spread" d="M{"L".join(edge)}Z"/>')
        if len(joined) == 1:
            parts.append(f'<circle class="{kind} dot" cx="{places[0][0]:.1f}" cy="{y(joined[0].mean):.1f}" r="2.2"/>')
            continue
        way = "L".join(f"{at:.1f} {y(c.mean):.1f}" for at, c in places)
        parts.append(f'<path class="{kind}" d="M{way}"/>')
        if len(found) <= DOTS and kind == "kept":
            parts += [f'<circle class="{kind} dot" cx="{a:.1f}" cy="{y(c.mean):.1f}" r="2.2"/>' for a, c in places]
    return parts


def frame(curve: Curve, x: Scale, y: Scale, floor: float) -> list[str]:
    parts = []
    across, up = ticks(x.low, x.high, 10, least=1.0), ticks(y.low, y.high, max(4, int(curve.height / 40)))
    for value in up:
        parts += [line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")]
        parts += [label(LEFT - 8, y(value) + 3.5, short(value, up[1] - up[0] if len(up) > 1 else 0.0), "end")]
    for value in across:
        parts += [line(x(value), floor, x(value), floor + 4, "axis")]
        parts += [label(x(value), floor + 17, short(value, across[1] - across[0] if len(across) > 1 else 1.0))]
    return [*parts, line(LEFT, floor, WIDTH - RIGHT, floor, "axis")]


def attempts(curve: Curve, x: Scale, floor: float) -> list[str]:
    parts, free = [], 0.0
    for number, step in curve.attempts:
        at = x(step)
        told = titled(f"attempt {number} goes on from step {step}")
        parts.append(f'<g class="attempt">{told}{line(at, TOP - 8, at, floor, "turn")}')
        if at >= free:
            parts.append(label(at, TOP - 12, str(number), kind="turned"))
            free = at + 9.0 + 7.0 * len(str(number))
        parts.append("</g>")
    return parts


def marks(curve: Curve, x: Scale) -> list[str]:
    """One triangle a column, whatever number of steps it stands for."""
    places: dict[int, list[tuple[int, str]]] = {}
    for step, why in curve.marks:
        places.setdefault(int(x(step) / 3), []).append((step, why))
    parts = []
    for here in places.values():
        at = x(here[0][0])
        more = f", and {len(here) - 1} more up to step {here[-1][0]}" if len(here) > 1 else ""
        told = titled(f"step {here[0][0]}: {here[0][1]}{more}")
        shape = f"M{at - 4:.1f} {TOP:.1f}h8l-4 7z"
        parts.append(
            f'<g>{told}{line(at, TOP + 6, at, curve.height - BOTTOM, "bad")}<path class="wrong" d="{shape}"/></g>'
        )
    return parts


def strips(curve: Curve, x: Scale) -> list[str]:
    """What the pointer finds."""
    ordered, at, parts = sorted((step, number) for number, step in curve.attempts), 0, []
    attempt = "attempt 1"
    for found in columns(curve.points, x, STRIP):
        while at < len(ordered) and ordered[at][0] < found.last:
            attempt = f"attempt {ordered[at][1]}"
            at += 1
        steps = f"steps {found.first}–{found.last}" if found.last > found.first else f"step {found.first}"
        told = f"{steps}: {curve.name} {figure(found.mean, curve.digits)}"
        if found.high > found.low:
            told += f" ({figure(found.low, curve.digits)} to {figure(found.high, curve.digits)})"
        middle = x((found.first + found.last) / 2)
        height = curve.height - TOP - BOTTOM
        parts.append(box(middle - STRIP / 2, TOP, STRIP, height, "strip", f"{told}, {attempt}"))
    return parts


def draw(curve: Curve) -> str:
    floor = curve.height - BOTTOM
    last = max((step for step, _ in [*curve.points, *curve.evals]), default=0)
    x = Scale(0.0, max(last, 1), LEFT, WIDTH - RIGHT)
    y = Scale(*limits(curve), floor, TOP)
    parts = [
        box(x(first - 1), TOP, max(x(end) - x(first - 1), 1.0), floor - TOP, "again", f"steps {first}–{end} done again")
        for first, end in curve.again
    ]
    parts += frame(curve, x, y, floor)
    for replaced in curve.passes:
        parts += trace(columns(replaced, x), x, y, "replaced")
    found = columns(curve.points, x)
    parts += trace(found, x, y, "kept")
    parts += [
        f'<path class="above" d="M{x(c.first) - 3:.1f} {TOP + 7:.1f}l3 -5l3 5z"/>' for c in found if c.high > y.high
    ]
    if not found and not curve.evals:
        parts.append(label(WIDTH / 2, (TOP + floor) / 2, "no value to draw yet", kind="empty"))
    parts += [*attempts(curve, x, floor), *strips(curve, x), *marks(curve, x)]
    for step, value in curve.evals:
        if math.isfinite(value):
            told = titled(f"eval after step {step}: {curve.name} {figure(value, curve.digits)}")
            parts.append(f'<path class="eval" d="M{x(step):.1f} {y(value) - 5:.1f}l5 5l-5 5l-5 -5z">{told}</path>')
    return drawing(curve.height, parts, f"{text(curve.name)} over steps")
