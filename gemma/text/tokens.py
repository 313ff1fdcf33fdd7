"""Tokens on disk: a corpus is tokenised once, into two flat memory-mapped files, `train.bin` and `eval.bin`.

Every document stands as BOS, its tokens, EOS. Rows are windows over the flat file (see `gemma.train.data`), so one
tokenisation serves every sequence length. Built in a directory of its own and renamed when whole.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import dacite
import numpy as np

from gemma.config import ConfigError, Data
from gemma.text import corpus, tokenizer

FORMAT = 1  # part of the cache key: raise it when the files' meaning changes
GROUP_BYTES = 4 << 20  # text tokenised at a time
LOCK_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Meta:
    """What is known of a tokenised corpus."""

    dtype: str
    train_tokens: int
    eval_tokens: int
    documents: int
    text_bytes: int  # UTF-8, both splits
    fingerprint: str  # of the tokens themselves: equal on every host, or the run is refused

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text a predicted token stands for: by it nats become bits a byte. BOS is never predicted."""
        return self.text_bytes / (self.train_tokens + self.eval_tokens - self.documents)


@dataclass(frozen=True)
class Tokens:
    meta: Meta
    train: np.ndarray  # flat, memory-mapped
    eval: np.ndarray


def key(data: Data, files: list[Path]) -> str:
    """Names a tokenisation by all it depends on; a touched file is a new key."""
    listing = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    model = "byte"
    if data.tokenizer != "byte":
        model = hashlib.sha256(Path(data.tokenizer).expanduser().read_bytes()).hexdigest()
    facts = [FORMAT, data.text_key, data.eval_fraction, model, listing]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def open_tokens(data: Data, cache: Path, vocab: int, setting: str = "data.path") -> Tokens:
    """The tokens of `data`, tokenised now if `cache` lacks them.

    Processes of one machine, or of a shared file system, do the work once: the others wait for its lock.
    Raises ConfigError where the corpus or tokenizer cannot be used, or its ids exceed `vocab`.
    """
    files = corpus.files(data)
    coder = tokenizer.load(data.tokenizer)
    if coder.vocab > vocab:
        raise ConfigError(f"model.vocab={vocab}: data.tokenizer={data.tokenizer} makes {coder.vocab} ids")
    folder = cache / "tokens" / key(data, files)
    if not folder.exists():
        with lock(folder.with_suffix(".lock")):
            if not folder.exists():
                build(data, files, coder, folder)
    meta = dacite.from_dict(Meta, json.loads((folder / "meta.json").read_text()))
    return Tokens(meta, *(flat(folder / f"{split}.bin", meta.dtype) for split in ("train", "eval")))


def flat(path: Path, dtype: str) -> np.ndarray:
    """An empty file cannot be mapped: eval.bin of a set that is not split."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """An exclusive file lock; the kernel frees it when its holder dies. Raises TimeoutError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"waited {LOCK_TIMEOUT_S:.0f} s for another process to tokenise: {path}"
                    ) from None
                time.sleep(0.05)
        yield


def build(data: Data, files: list[Path], coder: tokenizer.Tokenizer, folder: Path) -> None:
    partial = folder.with_suffix(f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        meta = write_splits(data, files, coder, partial)
        (partial / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_splits(data: Data, files: list[Path], coder: tokenizer.Tokenizer, out: Path) -> Meta:
    dtype = np.dtype(np.uint16 if coder.vocab <= 2**16 else np.uint32)
    bos, eos = np.array([tokenizer.BOS], dtype), np.array([tokenizer.EOS], dtype)
    documents = text_bytes = 0
    with open(out / "train.bin", "wb") as train, open(out / "eval.bin", "wb") as held_out:
        for texts in grouped(text for path in files for text in corpus.documents(path, data.text_key)):
            for text, ids in zip(texts, coder.encode(texts), strict=True):
                raw = text.encode("utf-8", "surrogatepass")
                row = np.concatenate([bos, ids, eos], dtype=dtype, casting="unsafe")  # a document may be gigabytes
                (held_out if is_held_out(raw, data.eval_fraction) else train).write(row.tobytes())
                documents, text_bytes = documents + 1, text_bytes + len(raw)
    if not documents:
        raise ConfigError(f"data.path={data.path}: {len(files)} file(s), but no text in them")
    sizes = balance(out, data.eval_fraction, dtype.itemsize)
    digest = hashlib.sha256()
    for split in ("train", "eval"):
        with open(out / f"{split}.bin", "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(split.encode())
    return Meta(dtype.name, *sizes, documents, text_bytes, digest.hexdigest())


def grouped(texts: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def is_held_out(text: bytes, fraction: float) -> bool:
    """By content, so that two copies of a document fall on the same side."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def balance(out: Path, fraction: float, itemsize: int) -> tuple[int, int]:
    """Where a few large documents fell too unevenly, splits the flat stream instead: its last `fraction` is held out.

    Returns the tokens of train and eval.
    """
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
    return train.stat().st_size // itemsize, held_out.stat().st_size // itemsize
