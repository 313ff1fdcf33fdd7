"""Tokenises a corpus into a folder of its own, which is renamed when it is whole and on disk.

One process at a time, under a lock. Killed amid the work, it goes on with the file that it had not finished.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import dacite
import numpy as np

from gemma.config import ConfigError, Data
from gemma.text import documents, token_cache, tokenizer
from gemma.text.documents import Repaired
from gemma.text.token_cache import Meta

GROUP_BYTES = 4 << 20  # text tokenised at a time
SAVED_EVERY_S = 20.0  # at the end of a file, what is done so far is made safe after so long
SAID_EVERY_S = 10.0
LOCK_SAID_EVERY_S = 30.0


@dataclass
class Progress:
    """What is in the files so far."""

    files: int = 0
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(token_cache.SPLITS, 0))
    documents: int = 0
    text_bytes: int = 0
    repaired: Repaired = field(default_factory=Repaired)


@contextmanager
def lock(path: Path, wait_s: float) -> Iterator[None]:
    """An exclusive file lock; the kernel frees it when its holder dies. Raises TimeoutError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        begun = said = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                file.seek(0)
                what = f"for process {file.read().strip() or 'unknown'} to tokenise the same text (lock {path})"
                if now - begun > wait_s:
                    raise TimeoutError(f"waited {wait_s:.0f} s {what}") from None
                if now - said > LOCK_SAID_EVERY_S:
                    said = now
                    print(f"waiting {what}, for {now - begun:.0f} s of at most {wait_s:.0f} s", flush=True)
                time.sleep(0.05)
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def build(data: Data, paths: list[Path], coder: tokenizer.Tokenizer, folder: Path, setting: str) -> None:
    """Makes `folder`. Under its lock. Raises ConfigError where the text cannot be used."""
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        meta = write_splits(data, paths, coder, partial, setting)
    except (ConfigError, OSError):  # a full disk is not left full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    write_whole(partial / "meta.json", token_cache.written_meta(meta))
    partial.rename(folder)
    sync_folder(folder.parent)


def write_splits(data: Data, paths: list[Path], coder: tokenizer.Tokenizer, out: Path, setting: str) -> Meta:
    dtype = np.dtype(np.uint16 if coder.vocab <= 2**16 else np.uint32)
    done = read_progress(out, len(paths))
    reading = documents.reading(data, setting)
    if done.files:
        print(f"tokenising goes on after {done.files} of {len(paths)} files", flush=True)
    saved = said = time.monotonic()
    with (
        open_at(out / "train.bin", done.bytes["train"]) as train,
        open_at(out / "eval.bin", done.bytes["eval"]) as held,
    ):
        for path in paths[done.files :]:
            for texts in grouped(documents.read(path, reading, done.repaired)):
                write_group(texts, coder, dtype, data.eval_fraction, train, held, done)
                if time.monotonic() - said > SAID_EVERY_S:
                    said = time.monotonic()
                    print(
                        f"tokenising: file {done.files + 1} of {len(paths)}, {done.documents:,} documents,"
                        f" {done.text_bytes / 1e6:,.0f} MB of text",
                        flush=True,
                    )
            done.files += 1
            if time.monotonic() - saved > SAVED_EVERY_S:
                saved = time.monotonic()
                done.bytes = {"train": synced_size(train), "eval": synced_size(held)}
                write_whole(out / "progress.json", json.dumps(asdict(done)))
    if not done.documents:
        raise ConfigError(f"{setting}={data.path}: {len(paths)} file(s), but no text in them")
    (out / "progress.json").unlink(missing_ok=True)  # from here on the files are moved about
    if data.eval_fraction:
        balance(out, data.eval_fraction, dtype.itemsize)
    counts, found = {}, {}
    for split in token_cache.SPLITS:
        with open(out / f"{split}.bin", "r+b") as file:
            file.seek(0, os.SEEK_END)
            counts[split] = synced_size(file) // dtype.itemsize
        found[split] = token_cache.digests(out / f"{split}.bin")
    repaired = done.repaired
    return Meta(
        dtype=dtype.name,
        train_tokens=counts["train"],
        eval_tokens=counts["eval"],
        documents=done.documents,
        text_bytes=done.text_bytes,
        digests=found,
        repaired=repaired.documents,
        first_repaired=repaired.first,
    )


def write_group(
    texts: list[str],
    coder: tokenizer.Tokenizer,
    dtype: np.dtype,
    fraction: float,
    train: IO[bytes],
    held_out: IO[bytes],
    done: Progress,
) -> None:
    bos, eos = np.array([tokenizer.BOS], dtype), np.array([tokenizer.EOS], dtype)
    for text, ids in zip(texts, coder.encode(texts), strict=True):
        raw = text.encode("utf-8")
        row = np.concatenate([bos, ids, eos], dtype=dtype, casting="unsafe")
        (held_out if is_held_out(raw, fraction) else train).write(row.data)
        done.documents, done.text_bytes = done.documents + 1, done.text_bytes + len(raw)


def grouped(texts: Iterator[str]) -> Iterator[list[str]]:
    """Small texts together, since each call of a tokenizer costs; a large one by itself."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def is_held_out(text: bytes, fraction: float) -> bool:
    """By content, so that two copies of a document fall on the same side."""
    found = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(found, "big") < fraction * 2**64


def balance(out: Path, fraction: float, itemsize: int) -> None:
    """Where a few large documents fell too unevenly, splits the flat stream: its last `fraction` is held out."""
    train, held_out = out / "train.bin", out / "eval.bin"
    total = train.stat().st_size + held_out.stat().st_size
    if not fraction / 3 <= held_out.stat().st_size / total <= 3 * fraction:
        cut = int(total / itemsize * (1 - fraction)) * itemsize
        with open(train, "r+b") as head, open(held_out, "rb") as tail:
            head.seek(0, os.SEEK_END)
            shutil.copyfileobj(tail, head)
        with open(train, "r+b") as head, open(held_out, "wb") as tail:
            head.seek(cut)
            shutil.copyfileobj(head, tail)
            head.truncate(cut)


def read_progress(out: Path, files: int) -> Progress:
    """Of a build that was killed; none where what it left cannot be relied on."""
    try:
        found = dacite.from_dict(Progress, json.loads((out / "progress.json").read_text()))
        sizes = {split: (out / f"{split}.bin").stat().st_size for split in token_cache.SPLITS}
    except (OSError, ValueError, TypeError, dacite.DaciteError):
        return Progress()
    whole = all(found.bytes.get(split, -1) in range(size + 1) for split, size in sizes.items())
    return found if whole and 0 < found.files <= files else Progress()


def open_at(path: Path, size: int) -> IO[bytes]:
    """To go on writing after the first `size` bytes; what lies beyond is dropped."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - the caller closes it
    file.truncate(size)
    file.seek(size)
    return file


def synced_size(file: IO[bytes]) -> int:
    """The size, once all of it is on disk."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def write_whole(path: Path, text: str) -> None:
    """Written beside, on disk, then renamed."""
    beside = path.with_suffix(".writing")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What was renamed in it stays so after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
