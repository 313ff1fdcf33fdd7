"""Weights from outside on the devices: Hugging Face folders, imported checkpoints, runs.

    from gemma.weights import load_hf
    model = load_hf(FOLDER, dtype="bfloat16")
    logits_BTV = model(tokens_BT)

B batch, T time, V vocabulary, D width, P layer pairs.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from gemma.checkpoint import checksums
from gemma.config import ConfigError
from gemma.model.transformer import Gemma
from gemma.weights import layout
from gemma.weights.hf import open_hf
from gemma.weights.layout import EMBEDDING, Slot, WeightsError
from gemma.weights.sources import DTYPES, PARAMS, Own, Resized, Source, open_source, part

Tree = Any  # a nested dict of arrays, or of what stands for them


def load_hf(folder: str | Path, dtype: str = "float32") -> Gemma:
    """Gemma 2 from a Hugging Face folder (config.json, safetensors), on the default device.

    dtype: float32 or bfloat16, of the weights and of the computation. Calling the model with int tokens_BT gives
    float32 logits_BTV. Raises ConfigError naming what is wrong with the folder.
    """
    path = Path(folder).expanduser()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: allowed are {', '.join(DTYPES)}")
    try:
        source = open_hf(path)
        abstract = nnx.eval_shape(lambda: Gemma(source.model, rngs=nnx.Rngs(0), dtype=dtype))
        graph, state = nnx.split(abstract)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), nnx.to_pure_dict(state))
        return nnx.merge(graph, load(source, shapes))
    except WeightsError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_params(path: str, abstract: Tree, step: int | None = None) -> Tree:
    """The model's parameters from whatever weights lie at a path, placed and typed as `abstract` says.

    Each host reads only what its devices hold, and a checkpoint of ours is checked on the devices; where that is stored
    in another dtype, or with fewer embedding rows (256000 in Hugging Face's, 256128 in JAX's: the rows behind are
    zeros), each host reads it once more to check it. step: of a run's checkpoints, None the newest.

    Raises WeightsError.
    """
    stored = open_source(Path(path).expanduser(), step=step)
    rows, source = abstract[EMBEDDING].shape[0], stored
    if rows > stored.model.vocab:
        print(f"{path}: {stored.model.vocab} embedding rows; the {rows - stored.model.vocab} behind them are zeros")
        source = Resized(stored, rows)
    if not isinstance(stored, Own):
        return load(source, abstract)
    leaves = flatten_dict(abstract, sep=".")
    if any(stored.arrays[leaf].shape != s.shape or stored.dtype(leaf) != s.dtype for leaf, s in leaves.items()):
        stored.check_sums()
        return load(source, abstract)
    params = load(source, abstract)
    summing = checksums.summing({PARAMS: abstract}, leaves[EMBEDDING].sharding.mesh)
    found = checksums.as_hex({PARAMS: params}, summing({PARAMS: params}))
    noted = stored.noted()
    changed = sorted(name for name, value in found.items() if noted.get(name) != value)
    if changed:
        raise WeightsError(f"{changed[0]} is not what was saved, by its checksum")
    return params


def load(source: Source, abstract: Tree) -> Tree:
    """Every leaf of `abstract` (jax.ShapeDtypeStruct with sharding) from the source. Raises WeightsError."""
    flat = flatten_dict(abstract, sep=".")
    want = {leaf: struct.shape for leaf, struct in flat.items()}
    layout.match(want, {leaf: layout.own_shape(source.model, leaf) for leaf in layout.leaves(source.model)})
    loaded = {
        leaf: jax.make_array_from_callback(struct.shape, struct.sharding, partial(region, source, leaf, struct.dtype))
        for leaf, struct in flat.items()
    }
    return unflatten_dict(loaded, sep=".")


def region(source: Source, leaf: str, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """leaf[index] in a dtype: a device's share."""
    if leaf == EMBEDDING:
        return source.read(Slot(leaf, ()), index[0])[:, index[1]].astype(dtype)
    shape = layout.own_shape(source.model, leaf)
    stacked = len(shape) - len(layout.own_dims(leaf))  # its first axes: pairs, and which of two or four
    ranges = [range(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
    out = np.empty([len(r) for r in ranges], dtype)
    for at in np.ndindex(*(len(r) for r in ranges[:stacked])):
        slot = Slot(leaf, tuple(ranges[axis][i] for axis, i in enumerate(at)))
        out[at] = share(source, slot, index[stacked:])
    return out


def share(source: Source, slot: Slot, index: tuple[slice, ...]) -> np.ndarray:
    """Of a part, what a device holds; a checkpoint of ours is cut so that little else is read."""
    if isinstance(source, Own):
        return part(source.arrays[slot.leaf], slot.leaf, (*slot.index, *index))
    return source.read(slot)[index]
