"""Where weights come from: each source is looked over whole, then read a part of a layer at a time. No JAX.

D width, F hidden, V vocabulary, P layer pairs.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from gemma.config import ConfigError, Model
from gemma.text.chat import turn_ids
from gemma.text.tokenizer import Tokenizer
from gemma.weights import folders, layout, sums
from gemma.weights.arrays import Arrays, open_arrays
from gemma.weights.hf import open_hf
from gemma.weights.layout import EMBEDDING, Place, Slot, WeightsError

PARAMS = "params"  # where a checkpoint of ours keeps the model
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float16", "bfloat16")}
EVERY_ROW = slice(None)
FREE = {"name", "vocab", "context"}  # of Model: what weights do not fix; rows of the embedding may be added


class Source(Protocol):
    """Weights of a model, found whole."""

    @property
    def model(self) -> Model: ...

    def dtype(self, leaf: str) -> np.dtype: ...

    def read(self, slot: Slot, rows: slice = EVERY_ROW) -> np.ndarray:
        """A part as we hold it. rows: of the embedding only. Raises WeightsError."""
        ...


@dataclass(frozen=True)
class Own:
    """A checkpoint of ours: imported, or a run's."""

    model: Model
    arrays: dict[str, Any]  # by leaf
    folder: Path  # of the arrays

    def dtype(self, leaf: str) -> np.dtype:
        return self.arrays[leaf].dtype.numpy_dtype

    def noted(self) -> dict[str, str]:
        """The checksums of its arrays, by name. Raises WeightsError where there are none."""
        return sums.noted(self.folder)

    def check_sums(self) -> None:
        """Reads all of it once. Raises WeightsError where it is not what was saved, or nobody can know."""
        sums.check(self.folder, self.arrays, PARAMS)

    def read(self, slot: Slot, rows: slice = EVERY_ROW) -> np.ndarray:
        return part(self.arrays[slot.leaf], slot.leaf, (*slot.index, rows))


@dataclass(frozen=True)
class Released:
    """A Flax checkpoint as Google releases them."""

    model: Model
    arrays: dict[str, Any]  # by tensor
    places: dict[Slot, Place]

    @cached_property
    def by_leaf(self) -> dict[str, Place]:
        return {slot.leaf: place for slot, place in self.places.items()}

    def dtype(self, leaf: str) -> np.dtype:
        return self.arrays[self.by_leaf[leaf].tensor].dtype.numpy_dtype

    def read(self, slot: Slot, rows: slice = EVERY_ROW) -> np.ndarray:
        place = self.places[slot]
        index = () if place.index is None else (place.index,)
        return layout.to_own(self.model, place, part(self.arrays[place.tensor], place.tensor, (*index, rows)))


@dataclass(frozen=True)
class Resized:
    """A source with another number of embedding rows: rows of zeros behind its own, or its last ones left out."""

    source: Source
    vocab: int

    @property
    def model(self) -> Model:
        return replace(self.source.model, vocab=self.vocab)

    def dtype(self, leaf: str) -> np.dtype:
        return self.source.dtype(leaf)

    def read(self, slot: Slot, rows: slice = EVERY_ROW) -> np.ndarray:
        if slot.leaf != EMBEDDING:
            return self.source.read(slot, rows)
        start, stop, _ = rows.indices(self.vocab)
        there = min(max(stop, start), self.source.model.vocab)
        out_VD = np.zeros((stop - start, self.model.width), self.dtype(slot.leaf))
        if start < there:
            out_VD[: there - start] = self.source.read(slot, slice(start, there))
        return out_VD


def part(array: Any, name: str, index: tuple[Any, ...]) -> np.ndarray:
    try:
        return layout.finite(name, array[index].read().result())
    except (ValueError, OSError) as error:
        raise WeightsError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error


def open_source(
    path: Path, *, model: Model | None = None, step: int | None = None, gating: str | None = None
) -> Source:
    """Whatever weights lie at a path. Raises WeightsError naming what is missing, extra, misshapen or cut off.

    model, gating: of a released checkpoint, which does not say (gating only where its shape does not tell).
    """
    found = folders.find(path, step)
    if found.kind == "hf":
        return open_hf(path)
    if found.model is not None:
        return open_own(found.model, open_arrays(found.arrays))
    if model is None:
        raise WeightsError("a released checkpoint does not say of which model it is; launch.convert takes model=NAME")
    return open_released(model, open_arrays(found.arrays), gating)


def open_own(model: Model, stored: Arrays) -> Own:
    names = {".".join(name[1:]): name for name in stored.names if name[0] == PARAMS}
    arrays = {leaf: stored.open(name) for leaf, name in names.items()}
    want = {leaf: layout.own_shape(model, leaf) for leaf in layout.leaves(model)}
    layout.match(want, {leaf: array.shape for leaf, array in arrays.items()})
    check_dtypes(arrays)
    return Own(model, arrays, stored.folder)


def open_released(model: Model, stored: Arrays, gating: str | None) -> Released:
    arrays = {canonical(name): stored.open(name) for name in stored.names}
    table = layout.released(model, gating or gating_order(model, arrays))
    layout.match(layout.tensor_shapes(model, table), {name: array.shape for name, array in arrays.items()})
    check_dtypes(arrays)
    places = {place.slot: place for place in layout.places(model, table)}
    for slot, place in places.items():
        dtypes = {arrays[p.tensor].dtype for p in (place, places[Slot(slot.leaf, (0,) * len(slot.index))])}
        if len(dtypes) > 1:
            raise WeightsError(f"{place.tensor} has another dtype than the same of layer 0 or 1: they must be alike")
    return Released(model, arrays, places)


def canonical(path: tuple[str, ...]) -> str:
    """Flat names with slashes, as released; or a tree, as google-deepmind/gemma saves what it has loaded."""
    name = "/".join(path).removeprefix("params/")
    name = name if name.startswith("transformer/") else f"transformer/{name}"
    return f"{name}/w" if name.endswith(("/mlp/linear", "/mlp/gating_einsum")) else name


def gating_order(model: Model, arrays: dict[str, Any]) -> str:
    """Of the MLP's first matrices: [2, D, F] in 2B, [2, F, D] in 9B and 27B. Raises WeightsError where D = F."""
    if model.width == model.hidden:
        raise WeightsError(
            f"model.width=model.hidden={model.width}: the gating's shape does not tell its order;"
            " give gating=DF (as in 2B) or gating=FD (as in 9B and 27B)"
        )
    first = arrays.get("transformer/layer_0/mlp/gating_einsum/w")
    return "FD" if first is not None and first.shape[1:] == (model.hidden, model.width) else "DF"


def check_dtypes(arrays: dict[str, Any]) -> None:
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise WeightsError(f"{name} is {array.dtype.name}; allowed are {', '.join(DTYPES)}")


def check_judge(key: str, path: str, coder: Tokenizer) -> None:
    """The weights at a path, named by a config key, are whole, and know the tokenizer's ids. Raises ConfigError."""
    try:
        found = open_source(Path(path).expanduser()).model
    except WeightsError as error:
        raise ConfigError(f"{key}={path}: {error}") from error
    if found.vocab < max(coder.vocab, 1 + max(turn_ids(coder))):
        raise ConfigError(f"{key}={path}: has {found.vocab} embedding rows, data.tokenizer makes {coder.vocab} ids")


def check_model(key: str, path: str, wanted: Model, step: int | None = None) -> None:
    """The weights at a path, named by a config key, are whole and of `wanted`, which may have more embedding rows.

    Not only the shapes: weights under another window, cap or query scale are another model. Raises ConfigError.
    """
    try:
        found = open_source(Path(path).expanduser(), step=step).model
    except WeightsError as error:
        raise ConfigError(f"{key}={path}: {error}") from error
    for field in (f.name for f in fields(Model) if f.name not in FREE):
        ours, theirs = getattr(wanted, field), getattr(found, field)
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            raise ConfigError(f"model.{field}={ours}: {key}={path} has model.{field}={theirs}")
    if wanted.vocab < found.vocab:
        raise ConfigError(f"model.vocab={wanted.vocab}: {key}={path} has {found.vocab} rows; allowed: at least as many")
