"""Tokens in the cache: a folder of two flat files, `train.bin` and `eval.bin`, and what must be in them, `meta.json`.

The cache is not believed. `meta.json` has a digest of each chunk, and the fingerprint is made of the digests, so it is
the fingerprint of what is read. Up to EAGER_BYTES, some seconds of reading, all is checked when the tokens are opened,
and what is damaged is made again. Of more each chunk is checked when a row of it is first read: every start of a run
would else read 100 GB. What is then found damaged ends the attempt, and is not there any more for the next.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dacite
import numpy as np
import xxhash

from gemma.text.files import Listing

CHUNK_BYTES = 4 << 20
EAGER_BYTES = 16 << 30  # four seconds at the speed of the digest
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Meta:
    """What is known of a tokenised corpus."""

    dtype: str
    train_tokens: int
    eval_tokens: int
    documents: int
    text_bytes: int  # UTF-8, both splits
    digests: dict[str, list[str]]  # of each split, of each chunk of CHUNK_BYTES
    repaired: int = 0  # documents with half a character, read as U+FFFD
    first_repaired: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of the tokens themselves: equal on every host, or the run is refused."""
        facts = [self.dtype, self.train_tokens, self.eval_tokens, self.digests]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text a predicted token stands for: by it nats become bits a byte. BOS is never predicted."""
        return self.text_bytes / (self.train_tokens + self.eval_tokens - self.documents)


class DamagedError(Exception):
    """What is in the cache is not what was written there."""


@dataclass(frozen=True)
class Checked:
    """A memory-mapped file of tokens of which every chunk is checked when it is first read. Read it by slices."""

    mapped: np.ndarray
    digests: list[str]
    folder: Path  # removed where a chunk is damaged
    name: str
    good: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.mapped)

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(len(self.mapped))
        size = CHUNK_BYTES // self.mapped.itemsize
        for chunk in range(start // size, -(-stop // size)):
            if chunk not in self.good:
                if digest(self.mapped[chunk * size : (chunk + 1) * size]) != self.digests[chunk]:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    raise DamagedError(
                        f"{self.folder / self.name}: bytes {chunk * CHUNK_BYTES}.. are not what was written there; the"
                        " folder is removed, so that the next start tokenises again"
                    )
                self.good.add(chunk)
        return self.mapped[start:stop]


@dataclass(frozen=True)
class Tokens:
    meta: Meta
    train: np.ndarray | Checked  # flat
    eval: np.ndarray | Checked
    listing: Listing = field(default_factory=lambda: Listing([], []))  # of the files that they were made of


def digest(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def digests(path: Path) -> list[str]:
    """Of each chunk of a file."""
    with open(path, "rb") as file:
        return [digest(chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b"")]


def open_cached(folder: Path, found: Listing) -> Tokens:
    """Raises FileNotFoundError where there is nothing, DamagedError where something is not as it was written."""
    meta = read_meta(folder)
    itemsize = np.dtype(meta.dtype).itemsize
    sizes = {"train": meta.train_tokens * itemsize, "eval": meta.eval_tokens * itemsize}
    for split, size in sizes.items():
        path = folder / f"{split}.bin"
        there = path.stat().st_size if path.is_file() else -1
        if there != size or len(meta.digests.get(split, ())) != -(-size // CHUNK_BYTES):
            raise DamagedError(f"{path} has {there} bytes, not {size}")
    eager = sum(sizes.values()) <= EAGER_BYTES
    return Tokens(meta, flat(folder, "train", meta, eager), flat(folder, "eval", meta, eager), found)


def read_meta(folder: Path) -> Meta:
    path = folder / "meta.json"
    if not folder.exists():
        raise FileNotFoundError(folder)
    try:
        written = json.loads(path.read_text())
        meta = dacite.from_dict(Meta, written["meta"], dacite.Config(strict=True))
        if written["digest"] != meta_digest(meta):
            raise DamagedError(f"{path} is not what was written there")
    except (OSError, ValueError, TypeError, KeyError, RecursionError, dacite.DaciteError) as error:
        raise DamagedError(f"{path} cannot be read ({error!r})") from error
    return meta


def flat(folder: Path, split: str, meta: Meta, eager: bool) -> np.ndarray | Checked:
    """One split, checked now or as it is read."""
    path, known = folder / f"{split}.bin", meta.digests[split]
    if not known:
        return np.zeros(0, meta.dtype)  # an empty file cannot be mapped
    mapped = np.memmap(path, meta.dtype, "r")
    if not eager:
        return Checked(mapped, known, folder, path.name)
    for chunk, found in enumerate(digests(path)):
        if found != known[chunk]:
            raise DamagedError(f"{path}: bytes {chunk * CHUNK_BYTES}.. are not what was written there")
    return mapped


def written_meta(meta: Meta) -> str:
    return json.dumps({"digest": meta_digest(meta), "meta": asdict(meta)}, indent=1)


def meta_digest(meta: Meta) -> str:
    return digest(json.dumps(asdict(meta), sort_keys=True).encode())
