"""Batches: `batch(step)` is a pure function of (config, seed, step), the same for any number of hosts.

B batch, T time, U = T + 1.

Row i is the window tokens[i*T : i*T + T + 1] of the flat file, so rows overlap by the one token that is the last
target of one and the first input of the next. Grain shuffles by random access, a new order each epoch: there is
no iterator whose state could be lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grain
import jax
import numpy as np

from gemma.config import ConfigError, Data
from gemma.text.tokenizer import PAD
from gemma.text.tokens import Tokens


@dataclass(frozen=True)
class Rows:
    """Fixed-length windows over a flat token array."""

    tokens: np.ndarray
    sequence: int

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.sequence)

    def __getitem__(self, row: int) -> np.ndarray:
        start = int(row) * self.sequence
        return np.asarray(self.tokens[start : start + self.sequence + 1], np.int32)


@dataclass(frozen=True)
class Dataset:
    """Train rows in their shuffled, endless order, and the held-out rows in theirs. Both by random access."""

    train: grain.MapDataset
    ids: grain.MapDataset  # the numbers of train's rows in the flat file, in train's order
    eval: Rows
    batch: int
    sequence: int

    def train_rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """tokens_bU, int32: rows start..stop-1 of the global batch of `step`."""
        first = step * self.batch
        return np.stack([self.train[first + row] for row in range(start, stop)])

    def eval_rows(self, index: int, start: int, stop: int) -> np.ndarray:
        """tokens_bU of the index-th held-out batch; past the end come rows of padding, which weigh nothing."""
        first = index * self.batch
        blank = np.full(self.sequence + 1, PAD, np.int32)
        rows = range(first + start, first + stop)
        return np.stack([self.eval[row] if row < len(self.eval) else blank for row in rows])


def open_dataset(tokens: Tokens, data: Data, batch: int, seed: int) -> Dataset:
    """Raises ConfigError where the corpus is too small for one batch of distinct rows or one held-out row."""
    train, held_out = Rows(tokens.train, data.sequence), Rows(tokens.eval, data.sequence)
    name = f"data.path={data.path}"
    if len(train) < batch:
        raise ConfigError(
            f"{name}: {len(tokens.train)} training tokens make {len(train)} rows of data.sequence={data.sequence};"
            f" train.batch={batch} needs as many"
        )
    if len(held_out) < 1:
        raise ConfigError(
            f"{name}: {len(tokens.eval)} held-out tokens, less than one row of data.sequence={data.sequence};"
            f" raise data.eval_fraction={data.eval_fraction} or give more text"
        )
    rows, ids = (endless(grain.MapDataset.source(source), seed) for source in (train, range(len(train))))
    return Dataset(rows, ids, held_out, batch, data.sequence)


def endless(source: grain.MapDataset, seed: int) -> grain.MapDataset:
    """A new order each epoch, which depends on the seed and the source's length alone."""
    return source.seed(seed).shuffle().repeat(None)


def batch_index(step: int, skipped: Sequence[int]) -> int:
    """The batch that `step` trains on where those in `skipped`, ascending and distinct, are never used."""
    index = step
    for bad in skipped:
        if bad > index:
            break
        index += 1
    return index


def batch_ids(dataset: Dataset, index: int) -> list[int]:
    """Which rows the index-th training batch holds: row i is tokens[i*T : i*T + T + 1] of the flat file."""
    first = index * dataset.batch
    return [int(dataset.ids[first + row]) for row in range(dataset.batch)]


def place(abstract: jax.ShapeDtypeStruct, rows: Callable[[int, int], np.ndarray]) -> jax.Array:
    """The global batch as one array of which this host reads only the rows on its own devices."""
    B, _ = abstract.shape
    read: dict[tuple[int, int], np.ndarray] = {}  # devices along `tensor` hold the same rows

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        start, stop = (0, B) if index is None else index[0].indices(B)[:2]
        if (start, stop) not in read:
            read[start, stop] = rows(start, stop)
        return read[start, stop]

    return jax.make_array_from_callback(abstract.shape, abstract.sharding, shard)
