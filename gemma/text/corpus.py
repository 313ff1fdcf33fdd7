"""The texts of a run: what can be refused before anything starts, their tokens, and what is written down of them."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma.config import ConfigError, Data, Eval
from gemma.text import documents, files
from gemma.text.documents import Repaired
from gemma.text.token_cache import Tokens
from gemma.text.tokenise import write_whole
from gemma.text.tokens import open_tokens

SMALL_BYTES = 1 << 20  # what a check reads at most
LISTED = 200  # of the files that are left out, so many are named


def eval_set(data: Data, path: str) -> Data:
    """How a set of eval.sets is read: as data.path is, and all of it held out."""
    return replace(data, source="text", path=path, eval_fraction=0.0)


def check(data: Data, rows: int, setting: str = "data.path") -> None:
    """Refuses, within a moment, data that cannot train: nothing there, unreadable, no text, too large, or too little.

    rows: that it must have at least. A large corpus is read up to its first text: its deeper faults show when it is
    tokenised.
    """
    found = files.listing(data, setting)
    sizes = {path: path.stat().st_size for path in found.files}
    how = documents.reading(data, setting)
    for path, size in sizes.items():
        if size > how.limit_bytes and not documents.is_lines(path) and path.suffix.lower() != ".gz":
            raise documents.too_large(str(path), how.limit_bytes)
    small = sum(sizes.values()) < SMALL_BYTES
    text_bytes = documents_seen = 0
    for path in found.files:
        for text in documents.read(path, how, Repaired(), SMALL_BYTES):
            if not small:
                return
            text_bytes += len(text.encode("utf-8"))
            documents_seen += 1
    if not documents_seen:
        raise ConfigError(f"{setting}={data.path}: {len(found.files)} file(s), but no text in them")
    most_tokens = text_bytes + 2 * documents_seen  # no tokenizer makes more than a token a byte, and BOS and EOS
    if most_tokens < rows * data.sequence:
        raise ConfigError(
            f"{setting}={data.path}: {text_bytes} bytes of text are less than one batch of {rows} rows of"
            f" data.sequence={data.sequence}"
        )


@dataclass(frozen=True)
class Text:
    """What was read by one key of the config, as tokens."""

    setting: str  # the key
    data: Data
    tokens: Tokens


@dataclass(frozen=True)
class Texts:
    """All that a run reads."""

    own: Text
    sets: dict[str, Text]  # of eval.sets, by name in sorted order
    seconds: float  # that opening them took


def open_texts(data: Data, evals: Eval, cache: Path, vocab: int, lock_s: float = 600.0) -> Texts:
    """Tokenises what the cache lacks. lock_s: for another process that does the same. Raises ConfigError."""
    started = time.monotonic()
    own = Text("data.path", data, open_tokens(data, cache, vocab, lock_s=lock_s))
    sets = {}
    for name, path in sorted((evals.sets or {}).items()):
        of_set, setting = eval_set(data, path), f"eval.sets.{name}"
        sets[name] = Text(setting, of_set, open_tokens(of_set, cache, vocab, setting, lock_s))
    return Texts(own, sets, time.monotonic() - started)


def record(texts: Texts, path: Path) -> None:
    """Writes down what was read and what was left out. Raises OSError."""
    found = {"data": facts(texts.own), "eval_sets": {name: facts(text) for name, text in texts.sets.items()}}
    write_whole(path, json.dumps(found, indent=1) + "\n")


def facts(text: Text) -> dict[str, Any]:
    meta, listing = text.tokens.meta, text.tokens.listing
    return {
        "source": text.data.source,
        "path": text.data.path,
        "files": len(listing.files),
        "first_files": [str(path) for path in listing.files[:LISTED]],
        "left_out": listing.reasons(),
        "first_left_out": [{"path": one.path, "reason": one.reason} for one in listing.left_out[:LISTED]],
        "documents": meta.documents,
        "text_bytes": meta.text_bytes,
        "train_tokens": meta.train_tokens,
        "eval_tokens": meta.eval_tokens,
        "repaired_documents": meta.repaired,
        "first_repaired": meta.first_repaired,
        "fingerprint": meta.fingerprint,
    }


def warnings(texts: Texts) -> tuple[str, ...]:
    """A line for each text of which something was not read, or not as it stands."""
    return tuple(said for said in map(warning, [texts.own, *texts.sets.values()]) if said)


def warning(text: Text) -> str | None:
    meta, listing = text.tokens.meta, text.tokens.listing
    said = []
    if listing.left_out:
        said.append(f"{len(listing.files)} files are read; left out: {files.summary(listing)}")
    if meta.repaired:
        said.append(
            f"{meta.repaired} documents hold half a character (a lone surrogate), read as U+FFFD, the first"
            f" {meta.first_repaired}"
        )
    return f"{text.setting}={text.data.path}: {'; '.join(said)} (listed in data.json)" if said else None
