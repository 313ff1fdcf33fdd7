"""The documents in a file: strictly UTF-8 text, one document in memory at a time, and each of bounded size."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gemma.config import ConfigError, Data
from gemma.text.files import LINES

SURROGATE = re.compile("[\ud800-\udfff]")
BOM = b"\xef\xbb\xbf"
OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16, and UTF-32 of which the lower half begins so


@dataclass
class Repaired:
    """What had to be replaced in otherwise good text, counted."""

    documents: int = 0  # in which a lone surrogate, half a character, became U+FFFD
    first: str | None = None  # where


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_key: str  # the field of a line's object that holds the text
    limit_bytes: int  # what a document, or the line that holds it, may have, unpacked
    setting: str = "data.path"  # the key that the user gave the files by: it begins every refusal


def reading(data: Data, setting: str = "data.path") -> Reading:
    return Reading(data.text_key, round(data.max_document_mb * 1e6), setting)


def read(path: Path, how: Reading, repaired: Repaired, most_bytes: int | None = None) -> Iterator[str]:
    """The non-empty texts of one file: a line of .jsonl and .ndjson each, else the whole file.

    most_bytes: of a file that is one document no more is read and returned than its first bytes. Raises ConfigError
    naming file and line, or file and byte.
    """
    try:
        with open_bytes(path) as file:
            texts = lines(file, path, how, repaired) if is_lines(path) else iter([whole(file, path, how, most_bytes)])
            yield from (text for text in texts if text.strip())
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{how.setting}: cannot read {path} ({error})") from error


def open_bytes(path: Path) -> BinaryIO:
    """The unpacked bytes."""
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else open(path, "rb")


def is_lines(path: Path) -> bool:
    name = path.name.lower()
    return name.removesuffix(".gz").endswith(LINES)


def whole(file: BinaryIO, path: Path, how: Reading, most_bytes: int | None) -> str:
    raw = file.read(min(how.limit_bytes + 1, most_bytes or how.limit_bytes + 1))
    if len(raw) > how.limit_bytes:
        raise too_large(str(path), how.limit_bytes)
    return decoded(raw, how, str(path), cut=len(raw) == most_bytes)


def lines(file: BinaryIO, path: Path, how: Reading, repaired: Repaired) -> Iterator[str]:
    number = 0
    while raw := file.readline(how.limit_bytes + 1):
        number += 1
        where = f"{path}:{number}"
        if len(raw) > how.limit_bytes:
            raise too_large(where, how.limit_bytes)
        line = decoded(raw, how, where, first=number == 1)
        if not line.strip():
            continue
        text = field(line, how, where)
        if SURROGATE.search(text):
            text = SURROGATE.sub("\ufffd", text)
            repaired.documents, repaired.first = repaired.documents + 1, repaired.first or where
        yield text


def field(line: str, how: Reading, where: str) -> str:
    """The text of a line's object."""
    key = how.text_key
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{how.setting}: {where} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"data.text_key={key}: {where} has no such field: it is {type(found).__name__}, not an object"
        )
    if key not in found:
        shown = ", ".join(sorted(found)[:8]) or "none"
        raise ConfigError(f"data.text_key={key}: {where} has no such field; its fields: {shown}")
    text = found[key]
    if not isinstance(text, str):
        raise ConfigError(f"data.text_key={key}: {where} holds {type(text).__name__}, not text")
    return text


def decoded(raw: bytes, how: Reading, where: str, first: bool = True, cut: bool = False) -> str:
    """UTF-8, a byte order mark at the start left out. Raises ConfigError naming the first byte that is not text.

    first: raw begins the file. cut: raw may end amid a character, which is dropped.
    """
    begin = len(BOM) if first and raw.startswith(BOM) else 0
    why, byte = "", 0
    if first and raw.startswith(OTHER_BOMS):
        why = "UTF-16 and UTF-32 are not read"
    elif (zero := raw.find(0)) >= 0:
        why, byte = "a zero byte", zero
    else:
        try:
            return raw[begin:].decode("utf-8")
        except UnicodeDecodeError as error:
            if cut and begin + error.start >= len(raw) - 3:
                return raw[begin : begin + error.start].decode("utf-8")
            why, byte = error.reason, begin + error.start
    raise ConfigError(f"{how.setting}: {where} is not UTF-8 text, at byte {byte} ({why})")


def too_large(where: str, limit_bytes: int) -> ConfigError:
    return ConfigError(
        f"data.max_document_mb={limit_bytes / 1e6:g}: {where} is a larger document; split it, or raise the limit"
        " (tokenising takes 6 times a document's size of a host's memory, with SentencePiece 46 times)"
    )
