"""Rows by their place in the order of training: a pure function of (config, seed, place), the same on every host.

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
from gemma.text.token_cache import Checked, Tokens


@dataclass(frozen=True)
class Rows:
    """Fixed-length windows over a flat token array."""

    tokens: np.ndarray | Checked
    sequence: int

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.sequence)

    def __getitem__(self, row: int) -> np.ndarray:
        start = int(row) * self.sequence
        return np.asarray(self.tokens[start : start + self.sequence + 1], np.int32)


@dataclass(frozen=True)
class Dataset:
    """Train rows in their shuffled, endless order, by random access."""

    train: grain.MapDataset
    ids: grain.MapDataset  # the numbers of train's rows in the flat file, in train's order

    def train_rows(self, places: Sequence[int], start: int, stop: int) -> np.ndarray:
        """tokens_bU, int32: rows start..stop-1 of the global batch that holds these places of the order."""
        return np.stack([self.train[place] for place in places[start:stop]])


def open_dataset(tokens: Tokens, data: Data, batch: int, seed: int) -> Dataset:
    """Raises ConfigError where the corpus is too small for one batch of distinct rows."""
    train = Rows(tokens.train, data.sequence)
    name = f"data.path={data.path}"
    if len(train) < batch:
        raise ConfigError(
            f"{name}: {len(tokens.train)} training tokens make {len(train)} rows of data.sequence={data.sequence};"
            f" train.batch={batch} needs as many"
        )
    rows, ids = (endless(grain.MapDataset.source(source), seed) for source in (train, range(len(train))))
    return Dataset(rows, ids)


def endless(source: grain.MapDataset, seed: int) -> grain.MapDataset:
    """A new order each epoch, which depends on the seed and the source's length alone."""
    return source.seed(seed).shuffle().repeat(None)


def row_ids(dataset: Dataset, places: Sequence[int]) -> list[int]:
    """Which rows lie at these places of the order: row i is tokens[i*T : i*T + T + 1] of the flat file."""
    return [int(dataset.ids[place]) for place in places]


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
