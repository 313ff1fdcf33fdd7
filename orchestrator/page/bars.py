"""Time as SVG: what the controllers did from moment to moment, and the ledger's one bar."""

import bisect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.page.history import Controller, History, whole
from orchestrator.page.svg import (
    WIDTH,
    Scale,
    box,
    drawing,
    duration,
    elapsed,
    label,
    line,
    short,
    ticks,
    time_ticks,
    titled,
)
from orchestrator.page.timeline import Stretch
from orchestrator.recovery.incident import Incident

LEFT, RIGHT = 58.0, 12.0
STEPS_TOP, STEPS_FLOOR, LANE, BAND, BAND_FLOOR, HEIGHT = 10.0, 112.0, 134.0, 146.0, 182.0, 222.0
DRAWN_SINGLY = 400  # more stretches than this are drawn by columns
NAMED_FROM = 62.0  # the ledger's bar names what is at least this wide


@dataclass(frozen=True)
class Paper:
    """Where a time lies: controllers end to end, a gap of one width between two, however long it was."""

    controllers: Sequence[Controller]
    starts: Sequence[float]  # of each, on the paper
    before_s: Sequence[float]  # worked before each
    per_s: float

    def place(self, when: float) -> float:
        index = max(0, bisect.bisect_right([one.began for one in self.controllers], when) - 1)
        one = self.controllers[index]
        return self.starts[index] + (min(max(when, one.began), one.ended) - one.began) * self.per_s

    def end(self, index: int) -> float:
        return self.starts[index] + (self.controllers[index].ended - self.controllers[index].began) * self.per_s

    def after(self, worked_s: float) -> float:
        """Where so much work, gaps not counted, was done."""
        index = max(0, bisect.bisect_right(self.before_s, worked_s) - 1)
        return self.starts[index] + (worked_s - self.before_s[index]) * self.per_s


def worked(controllers: Sequence[Controller]) -> float:
    return sum(one.ended - one.began for one in controllers)


def laid_out(controllers: Sequence[Controller]) -> Paper:
    gap = min(30.0, 240.0 / max(len(controllers) - 1, 1))
    per_s = (WIDTH - LEFT - RIGHT - gap * (len(controllers) - 1)) / (worked(controllers) or 1.0)
    starts, before, at, done = [], [], LEFT, 0.0
    for one in controllers:
        starts.append(at)
        before.append(done)
        at += (one.ended - one.began) * per_s + gap
        done += one.ended - one.began
    return Paper(controllers, starts, before, per_s)


def timeline(history: History) -> str:
    if not history.controllers:
        return drawing(60, [label(WIDTH / 2, 34, "no controller has told anything yet", kind="empty")], "no timeline")
    paper = laid_out(history.controllers)
    stretches = [stretch for one in history.controllers for stretch in one.stretches]
    drawn = singly(stretches, paper) if len(stretches) <= DRAWN_SINGLY else by_column(stretches, paper)
    parts = [
        *axis(paper),
        *progress(history, paper),
        *drawn,
        *gaps(paper),
        *commits(history, paper),
        *bad_steps(history, paper),
    ]
    return drawing(HEIGHT, [*parts, *incidents(history.incidents, paper)], "phases of the run over wall time")


def axis(paper: Paper) -> list[str]:
    parts = [
        label(LEFT - 8, LANE - 2, "failures", "end"),
        label(LEFT - 8, (BAND + BAND_FLOOR) / 2 + 3.5, "phase", "end"),
    ]
    floor = BAND_FLOOR + 12
    parts += [line(start, floor, paper.end(i), floor, "axis") for i, start in enumerate(paper.starts)]
    for seconds in time_ticks(worked(paper.controllers)):
        at = paper.after(seconds)
        parts += [line(at, BAND_FLOOR + 12, at, BAND_FLOOR + 17, "axis"), label(at, HEIGHT - 8, elapsed(seconds))]
    return parts


def gaps(paper: Paper) -> list[str]:
    parts = []
    for index, (one, following) in enumerate(zip(paper.controllers, paper.controllers[1:], strict=False)):
        start, width = paper.end(index), paper.starts[index + 1] - paper.end(index)
        away = duration(following.began - one.ended)
        parts.append(box(start, STEPS_TOP, width, BAND_FLOOR - STEPS_TOP, "gap", f"{one.end}; resumed {away} later"))
        if width >= 14:
            middle = f"{start + width / 2 + 3.5:.1f} {(STEPS_TOP + BAND_FLOOR) / 2:.1f}"
            told = f"{one.end} · resumed {away} later"
            turned = f'transform="translate({middle}) rotate(-90)"'
            parts.append(f'<text class="tick away" text-anchor="middle" {turned}>{told}</text>')
    return parts


def progress(history: History, paper: Paper) -> list[str]:
    """Steps done over time: a step back is work lost."""
    rows = [row for row in history.rows if row.time > 0]
    most = max((row.step for row in rows), default=0)
    y = Scale(0.0, max(most, 1), STEPS_FLOOR, STEPS_TOP)
    marks = ticks(0.0, max(most, 1), 3, least=1.0)
    parts = [line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid") for value in marks]
    parts += [label(LEFT - 8, y(value) + 3.5, short(value, marks[1] - marks[0]), "end") for value in marks]
    parts.append(label(LEFT + 6, STEPS_TOP + 8, "steps done", "start"))
    begins = [one.began for one in paper.controllers]
    way: list[tuple[int, float, int]] = []  # whose, place, step; the last one of each column, and every step back
    for row in rows:
        here = (max(0, bisect.bisect_right(begins, row.time) - 1), paper.place(row.time), row.step)
        if (
            len(way) > 1
            and way[-1][0] == here[0]
            and int(way[-1][1]) == int(here[1])
            and way[-2][2] <= way[-1][2] < here[2]
        ):
            way.pop()
        way.append(here)
    path, last, highest = "", -1, 0
    for whose, at, step in way:
        if whose != last:
            path += f"M{at:.1f} {y(step):.1f}"
        elif step <= highest:
            path += f"H{at:.1f}V{y(step):.1f}"
        else:
            path += f"L{at:.1f} {y(step):.1f}"
        last, highest = whose, step
    return [*parts, f'<path class="kept" d="{path}"/>'] if path else parts


def told(stretch: Stretch) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(stretch.start))
    return f"{stretch.name}, {duration(stretch.end - stretch.start)} from {clock}, attempt {stretch.attempt}"


def kind(name: str) -> str:
    """The class that colours a bucket: no name from a file becomes one."""
    return f"b-{name}" if name.isascii() and name.isalpha() else "b-other"


def singly(stretches: Sequence[Stretch], paper: Paper) -> list[str]:
    parts = []
    for one in stretches:
        # A stretch ends where its controller does: not on the far side of a gap.
        start = paper.place(one.start)
        width = max((one.end - one.start) * paper.per_s, 0.3)
        parts.append(box(start, BAND, width, BAND_FLOOR - BAND, kind(one.name), told(one)))
    return parts


def by_column(stretches: Sequence[Stretch], paper: Paper) -> list[str]:
    """Each column shows what took most of it; like neighbours are one."""
    shares: dict[int, dict[str, float]] = {}
    for one in stretches:
        start = paper.place(one.start)
        end = start + (one.end - one.start) * paper.per_s
        for column in range(int(start), int(end) + 1):
            part = min(end, column + 1) - max(start, column)
            here = shares.setdefault(column, {})
            here[one.name] = here.get(one.name, 0.0) + max(part, 0.0)
    most = [(column, max(shares[column], key=lambda name: shares[column][name])) for column in sorted(shares)]
    parts, index = [], 0
    while index < len(most):
        end = index
        while end + 1 < len(most) and most[end + 1] == (most[end][0] + 1, most[index][1]):
            end += 1
        first, name = most[index]
        parts.append(box(first, BAND, end - index + 1, BAND_FLOOR - BAND, kind(name), f"mostly {name}"))
        index = end + 1
    return parts


def commits(history: History, paper: Paper) -> list[str]:
    places = {int(paper.place(e["time"])): whole(e.get("step")) for e in history.events if e.get("event") == "commit"}
    titles = {at: titled(f"checkpoint of step {step} is whole") for at, step in places.items()}
    dot = f'cy="{BAND_FLOOR + 6:.1f}" r="{2.6 if len(places) < 80 else 1.4}"'
    return [f'<circle class="b-save" cx="{at}" {dot}>{title}</circle>' for at, title in titles.items()]


def bad_steps(history: History, paper: Paper) -> list[str]:
    """Steps whose update was not applied, at the time at which the controller learned of them."""
    places: dict[int, list[int]] = {}
    for event in history.events:
        if event.get("event") == "bad_step":
            places.setdefault(int(paper.place(event["time"]) / 3), []).append(whole(event.get("step")))
    parts = []
    for place, steps in places.items():
        named = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        shape = f'<path class="odd" d="M{place * 3:.1f} {LANE - 1:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>'
        parts.append(f"<g>{titled(f'{named}: update not applied')}{shape}</g>")
    return parts


def incidents(found: Sequence[Incident], paper: Paper) -> list[str]:
    """A triangle for those of one place, numbered as in the table where there is room."""
    places: dict[int, list[tuple[int, Incident]]] = {}
    for number, one in enumerate(found, 1):
        places.setdefault(int(paper.place(one.time) / 2), []).append((number, one))
    parts, free = [], 0.0
    for here in (places[place] for place in sorted(places)):
        (first, one), (last, _) = here[0], here[-1]
        at = paper.place(one.time)
        said = [f"{n}: {i.outcome}, rank {i.rank}, after step {i.step}: {str(i.evidence)[:120]}" for n, i in here[:8]]
        shown = str(first) if first == last else f"{first}–{last}"
        half = 3.0 + 3.5 * len(shown)
        shape = f'<path class="wrong" d="M{at - 4.5:.1f} {LANE:.1f}h9l-4.5 8z"/>'
        named = ""
        if at - half >= free:
            named = label(at, LANE - 5, shown, kind="wrong number")
            free = at + half
        lines = line(at, LANE + 7, at, BAND_FLOOR, "bad")
        parts.append(f'<a href="#incident-{first}">{titled(chr(10).join(said))}{lines}{shape}{named}</a>')
    return parts


def ledger(buckets: Sequence[tuple[str, float]]) -> str:
    """One bar, as wide as all the time there is."""
    total = sum(seconds for _, seconds in buckets)
    parts: list[Any] = []
    at = 0.0
    for name, seconds in buckets:
        width = WIDTH * seconds / (total or 1.0)
        share = f"{seconds / (total or 1.0):.1%}"
        if width >= 0.05:
            parts.append(box(at, 0, width, 40, f"{kind(name)} piece", f"{name}: {duration(seconds)}, {share}"))
        if width >= NAMED_FROM:
            parts.append(label(at + 9, 17.5, name[: int(width / 7.5)], "start", f"on {kind(name)}-ink"))
            parts.append(label(at + 9, 31.5, share, "start", f"on {kind(name)}-ink"))
        at += width
    return drawing(40, parts, "share of each bucket of the ledger")
