"""Snapshots of a host's share of the state, in memory that outlives the process which writes them. No JAX.

A file in memory (memfd) belongs to one share. It holds a page that says how far training has come, then four slots:
the newest snapshot, the two before, and the one being written. While a host writes step n the slowest may still be
writing n-2, as no host is further ahead than that; so all of them hold n-3 or a later one, whenever they die.

A slot is a page of its header, the notes (JSON), and the share. The header is marked as empty before anything else of
the slot is written and names the step after everything is, so a writer that dies leaves no half snapshot.
"""

import json
import mmap
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOTS = 4
BACKGROUND_NICENESS = 10  # niceness of work beside training: it gets what training leaves of the processor
PROGRESS = struct.Struct("<qd")  # steps done by the process that writes here, and the time.time() of the last
HEADER = struct.Struct("<qqI")  # step of a whole snapshot, or EMPTY; bytes of its notes, and their CRC-32
EMPTY = -1
PAGE = 4096
NOTES_BYTES = 1 << 20  # JSON; pages that are never touched take no memory


@dataclass(frozen=True)
class Slots:
    memory: mmap.mmap
    share_bytes: int


def file_bytes(share_bytes: int) -> int:
    return PAGE + SLOTS * slot_bytes(share_bytes)


def slot_bytes(share_bytes: int) -> int:
    return PAGE + NOTES_BYTES + -(-share_bytes // PAGE) * PAGE


def clear(descriptor: int, share_bytes: int) -> Slots:
    """Maps a new file of zeros and marks its slots as empty."""
    slots = Slots(mmap.mmap(descriptor, file_bytes(share_bytes)), share_bytes)
    for slot in range(SLOTS):
        mark(slots, slot, EMPTY)
    tell_progress(slots, 0)
    return slots


def open_slots(path: Path, share_bytes: int) -> Slots:
    """Another process's slots, through /proc/PID/fd/N. Raises OSError where that process is gone."""
    with open(path, "r+b") as file:
        return Slots(mmap.mmap(file.fileno(), file_bytes(share_bytes)), share_bytes)


def tell_progress(slots: Slots, step: int) -> None:
    PROGRESS.pack_into(slots.memory, 0, step, time.time())


def progress(slots: Slots) -> tuple[int, float]:
    """Steps done, and the time.time() of the last: of a dead process too."""
    step, at = PROGRESS.unpack_from(slots.memory, 0)
    return step, at


def start_of(slots: Slots, slot: int) -> int:
    return PAGE + slot * slot_bytes(slots.share_bytes)


def mark(slots: Slots, slot: int, step: int, notes: bytes = b"") -> None:
    HEADER.pack_into(slots.memory, start_of(slots, slot), step, len(notes), zlib.crc32(notes))


def held(slots: Slots) -> dict[int, int]:
    """The slot of each whole snapshot, by step."""
    steps = {slot: HEADER.unpack_from(slots.memory, start_of(slots, slot))[0] for slot in range(SLOTS)}
    return {step: slot for slot, step in steps.items() if step != EMPTY}


def begin(slots: Slots, step: int) -> tuple[int, memoryview]:
    """Gives up the oldest step where all slots are taken; returns its slot and where the share goes."""
    found = held(slots)
    free = [slot for slot in range(SLOTS) if slot not in found.values()]
    # A step done again: its old snapshot may be of another history.
    slot = found[step] if step in found else free[0] if free else found[min(found)]
    mark(slots, slot, EMPTY)
    return slot, share(slots, slot)


def share(slots: Slots, slot: int) -> memoryview:
    start = start_of(slots, slot) + PAGE + NOTES_BYTES
    return memoryview(slots.memory)[start : start + slots.share_bytes]


def commit(slots: Slots, slot: int, step: int, notes: bytes) -> None:
    """From now on the slot holds `step`. notes: JSON, at most NOTES_BYTES."""
    if len(notes) > NOTES_BYTES:
        raise ValueError(f"notes of step {step}: {len(notes)} bytes, at most {NOTES_BYTES}")
    start = start_of(slots, slot) + PAGE
    slots.memory[start : start + len(notes)] = notes
    mark(slots, slot, step, notes)


def notes(slots: Slots, step: int) -> Any:
    """What was noted with a step. Raises KeyError where it is not held, ValueError where its notes are damaged."""
    return json.loads(raw_notes(slots, step))


def raw_notes(slots: Slots, step: int) -> bytes:
    """Raises as `notes` does."""
    slot = held(slots)[step]
    _, size, crc = HEADER.unpack_from(slots.memory, start_of(slots, slot))
    start = start_of(slots, slot) + PAGE
    found = slots.memory[start : start + size] if 0 < size <= NOTES_BYTES else b""
    if not found or zlib.crc32(found) != crc:
        raise ValueError(f"notes of step {step}: not what was written, by their checksum")
    return found


def drop(slots: Slots, step: int) -> None:
    """Gives up one step, if it is held."""
    if (slot := held(slots).get(step)) is not None:
        mark(slots, slot, EMPTY)


def drop_after(slots: Slots, step: int) -> None:
    """Gives up all snapshots beyond a step that the run goes back to."""
    for later, slot in held(slots).items():
        if later > step:
            mark(slots, slot, EMPTY)
