"""Documents: which files a data config names, and the texts inside. Plain Python, so that the launcher checks too."""

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from gemma.config import ConfigError, Data, naming

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")  # each also with .gz
SMALL_BYTES = 1 << 20  # what a check reads at most
SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "node_modules"}


def eval_set(data: Data, path: str) -> Data:
    """How a set of eval.sets is read: as data.path is, and all of it held out."""
    return replace(data, source="text", path=path, eval_fraction=0.0)


def files(data: Data) -> list[Path]:
    """The source's files, sorted. Raises ConfigError where there are none."""
    if data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = walk(root, (".py",))
        if not found:
            raise ConfigError(f"data=stdlib: no Python source below {root}; use data=text data.path=PATH")
        return found
    with naming(f"data.path={data.path}"):
        return named_files(data)


def named_files(data: Data) -> list[Path]:
    """Of a file, a directory or a glob."""
    named = Path(str(data.path)).expanduser()
    if named.is_file():
        return [named]
    if named.is_dir():
        found = walk(named, tuple(s + z for s in SUFFIXES for z in ("", ".gz")))
        if not found:
            allowed = ", ".join(SUFFIXES)
            raise ConfigError(f"data.path={data.path}: no text in this directory; read are {allowed}, also .gz")
        return found
    found = sorted(Path(p) for p in glob.glob(str(named), recursive=True) if os.path.isfile(p))
    if not found:
        raise ConfigError(f"data.path={data.path}: no such file or directory")
    return found


def walk(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for folder, dirs, names in os.walk(root):
        dirs[:] = [d for d in dirs if d not in SKIPPED_DIRS and not d.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(path for path in found if path.is_file())  # no dangling links, no pipes


def documents(path: Path, text_key: str, most_chars: int = -1) -> Iterator[str]:
    """The non-empty texts of one file: a jsonl line each, else the whole file. Raises ConfigError on broken ones.

    most_chars: what to read at most of a file that is one text; -1 is all.
    """
    try:
        with open_text(path) as file:
            texts = jsonl(file, path, text_key) if ".jsonl" in path.suffixes else iter([file.read(most_chars)])
            yield from (text for text in texts if text.strip())
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.path: cannot read {path} ({error})") from error


def open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="")
    return open(path, encoding="utf-8", errors="replace", newline="")


def jsonl(file: IO[str], path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"data.path: {path}:{number} is not JSON ({error})") from error
        except (KeyError, TypeError) as error:
            raise ConfigError(f"data.text_key={text_key}: {path}:{number} has no such field") from error
        if not isinstance(text, str):
            raise ConfigError(f"data.text_key={text_key}: {path}:{number} holds {type(text).__name__}, not text")
        yield text


def check(data: Data, rows: int, setting: str = "data.path") -> None:
    """Refuses, within a moment, data that cannot train: nothing there, unreadable, without text, or far too little.

    rows: what a batch needs. A large corpus is read up to its first text; its deeper faults show when it is tokenised.
    """
    found = files(data)
    small = sum(path.stat().st_size for path in found) < SMALL_BYTES
    text_bytes = documents_seen = 0
    for text in (text for path in found for text in documents(path, data.text_key, SMALL_BYTES)):
        if not small:
            return
        text_bytes += len(text.encode("utf-8", "surrogatepass"))
        documents_seen += 1
    if not documents_seen:
        raise ConfigError(f"data.path={data.path}: {len(found)} file(s), but no text in them")
    most_tokens = text_bytes + 2 * documents_seen  # no tokenizer makes more than a token a byte, BOS and EOS besides
    if most_tokens < rows * data.sequence:
        raise ConfigError(
            f"data.path={data.path}: {text_bytes} bytes of text are less than one batch of {rows} rows of"
            f" data.sequence={data.sequence}"
        )
