"""Which rows each step trains on when the batch changes and batches are skipped."""

import random

import pytest

from gemma.text.order import Order, places, recorded, rows_before, spans


def ready(step: int, batches: list[list[int]]) -> dict[str, object]:
    """The event of hosts that stand ready, as events.jsonl holds it."""
    return {"event": "restore", "step": step, "batches": batches}


def test_every_place_is_used_once_in_order_over_changes_of_the_batch() -> None:
    order = Order(((0, 8), (10, 16), (13, 3), (14, 8)))
    used = [place for step in range(20) for place in places(order, step)]
    assert used == list(range(10 * 8 + 3 * 16 + 3 + 6 * 8))
    assert rows_before(order, 20) == len(used)


def test_what_is_skipped_is_never_used_and_every_other_place_once_in_order() -> None:
    drawn = random.Random(0)
    for _ in range(200):
        order = Order(((0, 4), (5, drawn.randrange(1, 9)), (9, 4)))
        for _ in range(drawn.randrange(6)):  # as a rollback does: a whole batch of the run so far
            bad = spans(order, drawn.randrange(15))
            order = Order(order.batches, tuple(sorted({*order.skipped, *bad})))
        gone = {place for first, end in order.skipped for place in range(first, end)}
        used = [place for step in range(25) for place in places(order, step)]
        assert used == [place for place in range(1000) if place not in gone][: len(used)]
        assert len(used) == rows_before(order, 25)


def test_a_batch_around_a_skipped_one_is_named_in_two_spans() -> None:
    order = Order(((0, 4), (1, 8)), ((6, 10),))
    assert spans(order, 1) == ((4, 6), (10, 16))


def test_a_run_goes_on_with_the_rows_after_those_its_steps_have_used() -> None:
    events = [ready(0, [[0, 8]]), ready(7, [[0, 8]])]
    assert recorded(events, 10, 16).batches == ((0, 8), (10, 16))
    assert recorded(events, 10, 8).batches == ((0, 8),)


def test_steps_that_are_done_again_take_the_batch_of_today() -> None:
    events = [ready(0, [[0, 8]]), ready(10, [[0, 8], [10, 16]])]
    assert recorded(events, 6, 16).batches == ((0, 8), (6, 16))  # the newest checkpoint could not be read
    assert recorded(events, 12, 16).batches == ((0, 8), (10, 16))
    assert recorded(events, 0, 16).batches == ((0, 16),)


def test_a_restart_reads_what_the_attempt_before_it_read() -> None:
    events = [ready(0, [[0, 8]]), {"event": "skip_batch", "step": 4, "places": [[24, 32]]}]
    order = recorded(events, 5, 12)
    again = recorded([*events, ready(5, [list(one) for one in order.batches])], 9, 12)
    assert [places(again, step) for step in range(5, 20)] == [places(order, step) for step in range(5, 20)]


@pytest.mark.parametrize("events", [[], [{"event": "start", "step": 0}]])
def test_a_fresh_run_begins_at_the_first_row(events: list[dict[str, object]]) -> None:
    assert places(recorded(events, 0, 4), 0) == [0, 1, 2, 3]
