"""Measured values over steps, as the page's script draws them: what counts, what was done again, where attempts change.

A run of a million steps gives a few thousand points: the first, lowest, highest and last of each part of the axis.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from orchestrator.page.history import Row

POINTS = 3000  # a curve of more steps than this is thinned
PARTS = 700  # into so many parts of the axis, with up to five points each
LAYERS = 8  # of replaced steps: one that was done again more often is drawn for the newest times only
MARKS = 500
OUTLIER = 20.0  # a peak above so many times the usual range does not stretch the axis
SMOOTHED = 8  # steps: the hosts' results come back a window at a time, so that a step alone has no speed of its own

TITLES = {
    "loss": "Loss, nats per token",
    "bits_per_byte": "Bits per byte",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "tokens_per_s": f"Tokens/s, mean of {SMOOTHED} steps",
    "mfu": f"MFU, mean of {SMOOTHED} steps",
}
SPEEDS = {"tokens_per_s", "mfu"}
FROM_ZERO = {"tokens_per_s", "mfu", "learning_rate"}


def curves(rows: Sequence[Row], evals: Sequence[Any]) -> dict[str, Any]:
    """rows: as written, steps done again appear again. Numbers and lists alone, None where there is no value."""
    kept, passes = final(rows), replaced(rows)
    layers, left_out = stacked(passes)
    charts = [chart(name, kept, layers, evals) for name in TITLES]
    return {
        "charts": [one for one in charts if one["x"]],
        "again": bands(passes),
        "attempts": [[row.attempt, row.step - 1] for before, row in pairwise(rows) if row.attempt != before.attempt],
        "attempt": rows[0].attempt if rows else 1,
        "bad": bad_steps(rows),
        "thinned": max(0, len(kept) // PARTS) if len(kept) > POINTS else 0,
        "left_out": left_out,
    }


def final(rows: Iterable[Row]) -> list[Row]:
    """Each step as it came out last."""
    last = {row.step: row for row in rows}
    return [last[step] for step in sorted(last)]


def replaced(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that a later one of the same step made void, a list for each time through."""
    last = {row.step: index for index, row in enumerate(rows)}
    passes: list[list[Row]] = []
    for index, row in enumerate(rows):
        if last[row.step] != index:
            joins = passes and passes[-1][-1].step == row.step - 1 and passes[-1][-1].attempt == row.attempt
            if not joins:
                passes.append([])
            passes[-1].append(row)
    return passes


def stacked(passes: Sequence[Sequence[Row]]) -> tuple[list[list[Row]], int]:
    """Layers in which each step occurs once and no two passes touch, and how many of the oldest found no room."""
    layers: list[dict[int, Row]] = []
    left_out = 0
    for one in reversed(passes):
        around = range(one[0].step - 1, one[-1].step + 2)
        free = next((layer for layer in layers if not any(step in layer for step in around)), None)
        if free is None and len(layers) == LAYERS:
            left_out += 1
            continue
        if free is None:
            layers.append(free := {})
        free.update((row.step, row) for row in one)
    return [[layer[step] for step in sorted(layer)] for layer in layers], left_out


def bands(passes: Sequence[Sequence[Row]]) -> list[list[int]]:
    """First and last step of those done more than once, adjoining ones as one."""
    found: list[list[int]] = []
    for step in sorted({row.step for one in passes for row in one}):
        if found and found[-1][1] == step - 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return found


def bad_steps(rows: Sequence[Row]) -> list[list[Any]]:
    """First step, last step, how many, and what was wrong with the first."""
    found = sorted(
        (row.step, "no finite loss" if row.ok else "its update was not applied")
        for row in rows
        if not row.ok or math.isnan(row.loss)
    )
    size = -(-len(found) // MARKS) or 1
    groups = [found[at : at + size] for at in range(0, len(found), size)]
    return [[group[0][0], group[-1][0], len(group), group[0][1]] for group in groups]


def chart(name: str, kept: Sequence[Row], layers: Sequence[Sequence[Row]], evals: Sequence[Any]) -> dict[str, Any]:
    traces = [trace(name, rows) for rows in (kept, *layers)]
    if hasattr(evals[0] if evals else None, name):
        traces.append(trace(name, evals))
    values = np.concatenate([values[np.isfinite(values)] for _, values in traces])
    shown = [steps[drawn(steps, values)] for steps, values in traces] if values.size else [np.array([])]
    x = np.unique(np.concatenate(shown))
    y = [sampled(x, steps, values) for steps, values in traces]
    return {
        "name": name,
        "title": TITLES[name],
        "range": limits(values, name in FROM_ZERO),
        "x": [int(step) for step in x],
        "kept": y[0],
        "replaced": y[1 : 1 + len(layers)],
        "evals": y[1 + len(layers)] if len(y) > 1 + len(layers) else [],
    }


def trace(name: str, rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, each float64; NaN after a step whose successor is missing, so that no line leads over it."""
    steps = np.array([row.step for row in rows], float)
    values = np.array([getattr(row, name) for row in rows], float)
    if name in SPEEDS:
        values = smoothed(values, np.array([row.attempt for row in rows], float))
    if not rows or not hasattr(rows[0], "attempt"):
        return steps, values
    holes = np.flatnonzero(np.diff(steps) > 1) + 1
    return np.insert(steps, holes, steps[holes - 1] + 1), np.insert(values, holes, math.nan)


def smoothed(speeds: np.ndarray, attempts: np.ndarray) -> np.ndarray:
    """The mean speed of the newest SMOOTHED steps of one attempt, up to each step; NaN where it has none."""
    there = np.flatnonzero(speeds > 0)
    found = np.full(speeds.shape, math.nan)
    if there.size:
        order = np.arange(there.size)
        changes = np.r_[True, np.diff(attempts[there]) != 0]
        first = np.maximum(np.maximum.accumulate(np.where(changes, order, 0)), order - SMOOTHED + 1)
        total = np.r_[0.0, np.cumsum(1.0 / speeds[there])]
        found[there] = (order + 1 - first) / (total[order + 1] - total[first])
    return found


def drawn(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of what is drawn of a curve: all of a short one; of each part of a long one its first, lowest, highest
    and last value, and its first hole. x ascends."""
    if len(x) <= POINTS:
        return np.arange(len(x))
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], PARTS + 1)[1:-1])
    found: set[int] = set()
    for begin, end in pairwise([0, *edges, len(x)]):
        there = begin + np.flatnonzero(np.isfinite(y[begin:end]))
        if there.size:
            found |= {there[0], there[-1], there[np.argmin(y[there])], there[np.argmax(y[there])]}
        if there.size < end - begin:
            found.add(begin + int(np.argmin(np.isfinite(y[begin:end]))))
    return np.array(sorted(found), int)


def sampled(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> list[float | None]:
    """The curve's value at each place, with six digits."""
    if not len(x) or not len(at):
        return [None] * len(at)
    index = np.minimum(np.searchsorted(x, at), len(x) - 1)
    values = np.where(x[index] == at, y[index], math.nan)
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def limits(values: np.ndarray, from_zero: bool = False) -> list[float]:
    """Of the value's axis. A peak far above all else does not flatten the curve."""
    if not values.size:
        return [0.0, 1.0]
    low, high = 0.0 if from_zero else float(values.min()), float(values.max())
    usual = float(np.quantile(values, 0.98, method="lower")) - low
    if usual > 0 and high - low > OUTLIER * usual:
        high = float(values[values - low <= OUTLIER * usual].max())
    room = (high - low) * 0.06 if high > low else abs(high) * 0.1 or 1.0
    return [low if from_zero else low - room, high + room]
