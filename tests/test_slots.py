"""Snapshots in memory that outlives its writer: which steps are held, whatever moment the writer dies at."""

import os
from collections.abc import Iterator

import pytest

from gemma.memory import slots
from gemma.memory.slots import Slots

BYTES = 3 * slots.PAGE + 5


@pytest.fixture
def memory() -> Iterator[Slots]:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, slots.file_bytes(BYTES))
    yield slots.clear(descriptor, BYTES)
    os.close(descriptor)


def content(step: int) -> bytes:
    return bytes([step % 251]) * BYTES


def write(memory: Slots, step: int) -> None:
    slot, view = slots.begin(memory, step)
    view[:] = content(step)
    slots.commit(memory, slot, step, b'{"step": %d}' % step)


def test_new_memory_holds_nothing(memory: Slots) -> None:
    assert slots.held(memory) == {}


def test_the_newest_four_are_held_with_their_notes(memory: Slots) -> None:
    for step in range(1, 9):
        write(memory, step)
        assert sorted(slots.held(memory)) == list(range(max(1, step - 3), step + 1))
    for step, slot in slots.held(memory).items():
        assert bytes(slots.share(memory, slot)) == content(step)
        assert slots.notes(memory, step) == {"step": step}


def test_while_one_is_written_the_three_before_it_are_held(memory: Slots) -> None:
    for step in range(1, 9):
        write(memory, step)
    _, view = slots.begin(memory, 9)
    view[: BYTES // 2] = b"x" * (BYTES // 2)  # and here the writer dies
    assert sorted(slots.held(memory)) == [6, 7, 8]
    assert all(bytes(slots.share(memory, slot)) == content(step) for step, slot in slots.held(memory).items())


def test_going_back_gives_up_only_what_lies_beyond(memory: Slots) -> None:
    for step in (3, 4, 5):
        write(memory, step)
    slots.drop_after(memory, 4)
    assert sorted(slots.held(memory)) == [3, 4]
    write(memory, 5)
    assert sorted(slots.held(memory)) == [3, 4, 5]


def test_a_step_done_again_takes_the_place_of_its_old_snapshot(memory: Slots) -> None:
    for step in (3, 4, 5, 5):
        write(memory, step)
    assert sorted(slots.held(memory)) == [3, 4, 5]


def test_progress_is_read_from_outside(memory: Slots) -> None:
    slots.tell_progress(memory, 41)
    step, at = slots.progress(memory)
    assert step == 41
    assert at > 1.7e9


def test_notes_that_do_not_fit_are_refused_and_hold_nothing(memory: Slots) -> None:
    slot, _ = slots.begin(memory, 1)
    with pytest.raises(ValueError, match="notes of step 1"):
        slots.commit(memory, slot, 1, b" " * (slots.NOTES_BYTES + 1))
    assert slots.held(memory) == {}
