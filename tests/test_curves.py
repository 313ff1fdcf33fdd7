"""The curves of the report page: what is drawn is what was measured."""

import math

import numpy as np

from orchestrator.page.curves import PARTS, curves, drawn, limits, smoothed
from orchestrator.page.history import Eval, Row
from orchestrator.page.walltime import by_column

FALLING = np.array([2.0 + 10.0 / step for step in range(1, 201)])


def row(step: int, attempt: int = 1, loss: float = 2.0, ok: bool = True) -> Row:
    return Row(step, attempt, loss, 1.5 * loss, 1.0, 1e-3, 100.0, 0.4, 1.0, float(step), ok)


def loss_of(rows: list[Row], evals: list[Eval]) -> dict[str, object]:
    return curves(rows, evals)["charts"][0]


def test_an_axis_holds_every_value() -> None:
    low, high = limits(FALLING)
    assert low <= FALLING.min() < FALLING.max() <= high < 2 * FALLING.max()
    assert limits(FALLING, from_zero=True)[0] == 0.0


def test_one_peak_far_above_all_else_does_not_flatten_the_curve() -> None:
    assert 12.0 <= limits(np.r_[FALLING, 1e6])[1] < 20.0


def test_a_long_curve_keeps_the_first_lowest_highest_and_last_value_of_each_part() -> None:
    steps = np.arange(1.0, 1_000_001.0)
    values = np.sin(steps / 1000) + np.random.default_rng(0).normal(size=steps.size)
    values[123_456], values[777_777] = 50.0, math.nan
    kept = drawn(steps, values)
    assert len(kept) <= 5 * PARTS
    assert {0, 123_456, 777_777, 999_999} <= set(kept.tolist())
    edges = np.linspace(1, 1_000_000, PARTS + 1)
    for begin, end in ((0, 1), (300, 301), (PARTS - 1, PARTS)):
        part = (steps >= edges[begin]) & (steps <= edges[end])
        shown = kept[part[kept]]
        assert np.nanmin(values[part]) == np.nanmin(values[shown])
        assert np.nanmax(values[part]) == np.nanmax(values[shown])


def test_a_step_without_a_value_breaks_the_line() -> None:
    rows = [row(1), row(2), row(3, loss=math.nan), row(4), row(6), row(7)]
    found = loss_of(rows, [])
    assert dict(zip(found["x"], found["kept"], strict=True)) == {1: 2, 2: 2, 3: None, 4: 2, 5: None, 6: 2, 7: 2}


def test_steps_done_again_are_drawn_apart_from_those_that_count() -> None:
    rows = [row(step, 1, 9.0) for step in range(1, 7)] + [row(step, 2, 8.0) for step in range(4, 7)]
    rows += [row(step, 3, 7.0) for step in range(5, 9)]
    found = curves(rows, [Eval(6, 6.0, math.nan)])
    loss = found["charts"][0]
    assert loss["x"] == [*range(1, 9)]
    assert loss["kept"] == [9.0] * 3 + [8.0] + [7.0] * 4
    layers = [dict(zip(loss["x"], layer, strict=True)) for layer in loss["replaced"]]
    again = sorted((step, layer[step]) for layer in layers for step in layer if layer[step] is not None)
    assert again == [(4, 9.0), (5, 8.0), (5, 9.0), (6, 8.0), (6, 9.0)]
    assert loss["evals"] == [None] * 5 + [6.0] + [None] * 2
    assert (found["again"], found["attempts"]) == ([[4, 6]], [[2, 3], [3, 4]])


def test_a_speed_is_the_mean_of_its_attempts_newest_steps() -> None:
    speeds, attempts = np.array([1.0] * 10 + [math.nan] + [3.0, 1.0]), np.array([1] * 11 + [2] * 2)
    found = smoothed(speeds, attempts)
    assert found[:10].tolist() == [1.0] * 10
    assert math.isnan(found[10])
    assert found[11:].round(9).tolist() == [3.0, 1.5]


def test_a_column_shows_the_phase_that_took_most_of_it() -> None:
    found = by_column([(0.0, 1.4, "step"), (1.4, 1.6, "save"), (1.6, 2.3, "step"), (2.3, 3.0, "down")], 1.0)
    assert [one[:3] for one in found[:2]] == [[0.0, 2.0, "step"], [2.0, 3.0, "down"]]
