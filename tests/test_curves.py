"""The axes and columns of a curve: what is drawn is what was measured."""

import math

from orchestrator.page.curves import Curve, columns, limits, runs
from orchestrator.page.svg import Scale, short, ticks

FALLING = [(step, 2.0 + 10.0 / step) for step in range(1, 201)]


def test_an_axis_holds_every_value_that_is_there_however_many_are_missing() -> None:
    points = [(step, math.nan if step % 3 else value) for step, value in FALLING]
    kept = [value for _, value in points if math.isfinite(value)]
    low, high = limits(Curve("loss", 300.0, points))
    assert low <= min(kept) < max(kept) <= high < 2 * max(kept)


def test_one_peak_far_above_all_else_does_not_flatten_the_curve() -> None:
    points = [*FALLING[:100], (101, 1e6), *FALLING[101:]]
    assert 12.0 <= limits(Curve("loss", 300.0, points))[1] < 20.0


def test_columns_hold_every_point_once_with_its_lowest_and_highest() -> None:
    found = columns(FALLING, Scale(0, 200, 0, 50))
    assert len(found) == 51
    assert [(c.first, c.last) for c in found[:2]] == [(1, 3), (4, 7)]
    assert all((c.high, c.low) == (FALLING[c.first - 1][1], FALLING[c.last - 1][1]) for c in found)
    assert all(one.last + 1 == following.first for one, following in zip(found, found[1:], strict=False))


def test_no_line_leads_over_a_step_without_a_value() -> None:
    points = [(1, 1.0), (2, 1.0), (3, math.nan), (4, 1.0), (6, 1.0), (7, 1.0)]
    joined = list(runs(columns(points, Scale(0, 7, 0, 700))))
    assert [[c.first for c in one] for one in joined] == [[1, 2], [4], [6, 7]]


def test_ticks_are_round_lie_on_the_axis_and_read_differently() -> None:
    for low, high in ((0.0, 1.0), (1.93, 5.7), (0.0, 100_000.0), (3.0, 3.0004), (0.0, 2.5e9), (-1.0, 1.0)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 11
        assert all(low <= value <= high * 1.000001 for value in found)
        shown = [short(value, found[1] - found[0]) for value in found]
        assert len(set(shown)) == len(shown)
    assert ticks(0.0, 3.0, 10, least=1.0) == [0.0, 1.0, 2.0, 3.0]
