"""JSON files of a run directory: written whole and as strict JSON, read with tolerance for whatever a crash, a bad disk
or another program has made of them.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 2**63  # no integer of ours reaches it, and floats can hold those below
warned: set[tuple[Path, str]] = set()  # each problem of a file is printed once in a process


def warn(path: Path, problem: str) -> None:
    if (path, problem) not in warned:
        warned.add((path, problem))
        print(f"WARNING: {path}: {problem}", file=sys.stderr, flush=True)


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: a number that is not finite becomes null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def parse(data: bytes) -> dict[str, Any]:
    """One JSON object. Numbers that are not finite or too large are None, lone surrogates are question marks.

    Raises ValueError for anything else.
    """
    try:
        text = data.decode()
        found = json.loads(text, parse_constant=lambda _: None, parse_float=float_or_none, parse_int=int_or_none)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    if "\\ud" in text.lower():
        found = printable(found)
    return found


def float_or_none(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def int_or_none(text: str) -> int | None:
    return value if len(text) < 20 and abs(value := int(text)) < LARGEST else None


def printable(value: Any) -> Any:
    """Without lone surrogates, which no terminal and no file takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """A whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_object(path: Path) -> dict[str, Any] | None:
    """The object that a file holds; None where there is no file, and, with a warning, where it holds none."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(path, f"cannot be read and is passed over ({getattr(error, 'strerror', None) or error})")
    return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a jsonl file. A line that is no object is passed over, with a warning unless it is an unfinished last
    line, which a killed writer leaves.
    """
    bad, first = 0, ""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield parse(line)
                except ValueError as error:
                    if line.endswith(b"\n") and line.strip():
                        bad, first = bad + 1, first or f"line {number}: {error}"
    except FileNotFoundError:
        return
    except OSError as error:
        warn(path, f"cannot be read ({error.strerror})")
    if bad:
        warn(path, f"{bad} lines are damaged and passed over ({first})")


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Whole or not at all, also when the machine loses power: written beside, brought to the disk, then renamed.

    mode: of the file. Raises OSError where the disk does not take it.
    """
    partial = path.with_suffix(f".partial-{os.getpid()}")
    data = (dumps(value, indent=2) + "\n").encode()
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings a rename to the disk. Some network file systems take no fsync of a folder, and need none."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
