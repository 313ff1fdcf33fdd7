"""Reads what wandb's offline files hold. wandb ships no reader of its own; the format is LevelDB's log format
(leveldb/doc/log_format.md) after a header of seven bytes, each record a protobuf."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES = 7  # ":W&B", magic, version
BLOCK_BYTES = 32768
RECORD_HEADER_BYTES = 7  # crc32 (4), length (2), type (1)
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The whole records of one file; a torn end, as a killed writer leaves, ends the iteration."""
    data = path.read_bytes()
    at, parts = HEADER_BYTES, b""
    while at + RECORD_HEADER_BYTES <= len(data):
        room = BLOCK_BYTES - at % BLOCK_BYTES
        if room < RECORD_HEADER_BYTES:  # a block's last bytes, too few for a header, are padding
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += RECORD_HEADER_BYTES
        piece = data[at : at + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(piece) < length:
            return
        at += length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield parts


def history(folder: Path) -> Iterator[dict[str, Any]]:
    """Every history row of the offline runs in a run directory, in the order they were written."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}


def steps(folder: Path, name: str = "loss") -> set[int]:
    """The steps at which the offline runs in a run directory hold a value of this name."""
    return {int(row["step"]) for row in history(folder) if name in row}
