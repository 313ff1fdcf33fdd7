"""A run over the time in which its controllers lived, as the page's script draws it."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from orchestrator.page.curves import drawn
from orchestrator.page.figures import clock, duration
from orchestrator.page.history import Controller, History, number, whole
from orchestrator.page.timeline import Stretch

COLUMNS = 1000  # more phases than this are drawn by columns, marks of one column as one


def lived_s(controllers: Iterable[Controller]) -> float:
    return sum(one.ended - one.began for one in controllers)


def walltime(history: History) -> dict[str, Any]:
    """Lists of numbers and texts alone. Places are seconds of life: the time between two controllers takes no room."""
    controllers = history.controllers
    if not controllers:
        return {}
    length_s = lived_s(controllers)
    stretches = [stretch for one in controllers for stretch in one.stretches]
    steps = [(row.time, row.step) for row in history.rows if row.time > 0]
    at = np.maximum.accumulate(placed(controllers, [time for time, _ in steps]))
    done = np.array([step for _, step in steps], float)
    shown = drawn(at, done)
    return {
        "length_s": length_s,
        "at": [round(float(place), 2) for place in at[shown]],
        "done": [int(step) for step in done[shown]],
        "phases": phases(controllers, stretches, length_s),
        "joints": joints(controllers),
        "commits": marks(history, "commit", length_s),
        "bad": marks(history, "bad_step", length_s),
        "incidents": [
            [place, index, f"{one.outcome}, rank {one.rank}, after step {one.step}"[:120]]
            for index, (place, one) in enumerate(
                zip(
                    places(controllers, [number(one.time) for one in history.incidents]), history.incidents, strict=True
                ),
                1,
            )
        ],
    }


def placed(controllers: Sequence[Controller], times: Sequence[float]) -> np.ndarray:
    """The place of each time.time()."""
    ends = np.maximum.accumulate([end for one in controllers for end in (one.began, one.ended)])
    lived = np.cumsum([0.0, *(b - a if index % 2 == 0 else 0.0 for index, (a, b) in enumerate(pairwise(ends)))])
    return np.interp(np.nan_to_num(np.array(times, float), nan=ends[0]), ends, lived)


def places(controllers: Sequence[Controller], times: Sequence[float]) -> list[float]:
    return [round(float(place), 2) for place in placed(controllers, times)]


def joints(controllers: Sequence[Controller]) -> list[list[Any]]:
    """Where one controller ends and the next begins, and how long nobody was there."""
    found, at = [], 0.0
    for one, following in pairwise(controllers):
        at += one.ended - one.began
        found.append([round(at, 2), f"{one.end}; resumed {duration(following.began - one.ended)} later"])
    return found


def phases(controllers: Sequence[Controller], stretches: Sequence[Stretch], length_s: float) -> list[list[Any]]:
    """Begin, end, name, what there is to say of it."""
    ends = zip(
        places(controllers, [one.start for one in stretches]),
        (one.end - one.start for one in stretches),
        stretches,
        strict=True,
    )
    if len(stretches) > COLUMNS:
        return by_column([(begin, begin + took, one.name) for begin, took, one in ends], length_s / COLUMNS)
    # A stretch ends where its controller does, not on the far side of a joint.
    return [
        [begin, round(begin + took, 2), one.name, f"{duration(took)} from {clock(one.start, '%H:%M:%S')}"]
        for begin, took, one in ends
    ]


def by_column(stretches: Iterable[tuple[float, float, str]], width_s: float) -> list[list[Any]]:
    """Each column shows what took most of it; like neighbours are one."""
    shares: dict[int, dict[str, float]] = {}
    for begin, end, name in stretches:
        for column in range(int(begin / width_s), math.ceil(end / width_s)):
            here = shares.setdefault(column, {})
            part = min(end, (column + 1) * width_s) - max(begin, column * width_s)
            here[name] = here.get(name, 0.0) + max(part, 0.0)
    found: list[list[Any]] = []
    for column in sorted(shares):
        name = max(shares[column], key=lambda name: shares[column][name])
        if found and found[-1][2] == name and found[-1][1] == column:
            found[-1][1] = column + 1
        else:
            found.append([column, column + 1, name, "most of the time"])
    return [[round(begin * width_s, 2), round(end * width_s, 2), name, said] for begin, end, name, said in found]


def marks(history: History, event: str, length_s: float) -> list[list[Any]]:
    """Place, first step and last step of the events of one name, those of one column together."""
    there = [e for e in history.events if e.get("event") == event]
    found: dict[int, list[Any]] = {}
    for place, one in zip(places(history.controllers, [e["time"] for e in there]), there, strict=True):
        step = whole(one.get("step"))
        found.setdefault(int(place / (length_s or 1.0) * COLUMNS), [place, step, step])[2] = step
    return list(found.values())
