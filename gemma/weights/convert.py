"""Weights from one stored form into another, a part of a layer at a time. No JAX.

At most one part and a block of it are in memory, of the embedding a block. What is written is written beside its
place and renamed when whole. D width, V vocabulary.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma.config import ConfigError, Model
from gemma.weights import arrays, folders, hf, hf_config, layout, sums
from gemma.weights.layout import EMBEDDING, Place
from gemma.weights.sources import PARAMS, Source

BLOCK_BYTES = 8 << 20
QUIET, REMOVE_TIMEOUT_S = 4, 10.0
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SIDECARS = (*TOKENIZER, "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json")


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all went well and is gone when not. Raises ConfigError."""
    if out.exists():
        raise ConfigError(f"to={out}: exists; give a path that does not")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"to={out}: {out.absolute().parent} is not a directory")
    partial = out.absolute().with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"to={out}: cannot be written ({error.strerror or error})") from error
    finally:
        remove(partial)


def remove(folder: Path) -> None:
    """For good: an interrupted write goes on in TensorStore's threads and makes its file, and folders, again."""
    quiet = 0 if folder.exists() else QUIET
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while quiet < QUIET and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        quiet = 0 if folder.exists() else quiet + 1


def check_room(out: Path, source: Source, dtype: np.dtype | None) -> int:
    """The bytes to be written. Raises ConfigError where the disk has less."""
    shapes = {leaf: layout.own_shape(source.model, leaf) for leaf in layout.leaves(source.model)}
    size = sum(math.prod(shape) * (dtype or source.dtype(leaf)).itemsize for leaf, shape in shapes.items())
    free = shutil.disk_usage(out.absolute().parent).free if out.absolute().parent.is_dir() else size
    if free < size:
        raise ConfigError(f"to={out}: needs {size:,} bytes, the disk has {free:,}")
    return size


def row_blocks(source: Source, dtype: np.dtype) -> Iterator[slice]:
    """Rows of the embedding, a block at a time; whole chunks of an array of ours."""
    model = source.model
    rows = max(1, BLOCK_BYTES // (model.width * dtype.itemsize * arrays.ROWS)) * arrays.ROWS
    for start in range(0, model.vocab, rows):
        yield slice(start, min(start + rows, model.vocab))


def write_checkpoint(source: Source, out: Path, dtype: np.dtype | None = None) -> None:
    """Our own: model.json, and an Orbax checkpoint of {"params": the tree of gemma.model.transformer}."""
    model = source.model
    types = {leaf: dtype or source.dtype(leaf) for leaf in layout.leaves(model)}
    shapes = {}
    for leaf in types:
        shape = layout.own_shape(model, leaf)
        dims = "P24"[: len(shape) - len(layout.own_dims(leaf))] + layout.own_dims(leaf)
        shapes[(PARAMS, *leaf.split("."))] = (shape, types[leaf], arrays.chunk_shape(dims, shape, types[leaf].itemsize))
    made = arrays.create(out / "checkpoint", shapes)
    totals = {f"{PARAMS}.{leaf}": np.zeros(2, np.uint32) for leaf in types}
    for place in layout.places(model, layout.HF):
        leaf, shape = place.slot.leaf, layout.own_shape(model, place.slot.leaf)
        array = made[(PARAMS, *leaf.split("."))]
        if leaf == EMBEDDING:
            for rows in row_blocks(source, types[leaf]):
                part = cast(place.tensor, source.read(place.slot, rows), types[leaf])
                array[rows].write(part).result()
                totals[f"{PARAMS}.{leaf}"] += sums.sum_of_run(part, rows.start * shape[1])
        else:
            part = cast(place.tensor, source.read(place.slot), types[leaf])
            write_part(array, place.slot.index, layout.own_dims(leaf), part, types[leaf])
            before = int(
                np.ravel_multi_index(place.slot.index, shape[: len(place.slot.index)]) if place.slot.index else 0
            )
            totals[f"{PARAMS}.{leaf}"] += sums.sum_of_run(part, before * part.size)
    sums.note(out / "checkpoint", totals)
    (out / "model.json").write_text(folders.model_json(model))


def cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In another dtype. Raises WeightsError where a value is too large for it."""
    with np.errstate(over="ignore"):  # what overflows is infinite then, and refused by name
        return layout.finite(name, values.astype(dtype, copy=False))


def write_part(array: Any, index: tuple[int, ...], dims: str, part: np.ndarray, dtype: np.dtype) -> None:
    """array[index] = part, in blocks of whole chunks along D, so that little more than the part is in memory."""
    axis = dims.index("D")
    chunk = array.chunk_layout.write_chunk.shape[len(index) + axis]
    size = part.shape[axis]
    step = chunk * max(1, BLOCK_BYTES // (part.nbytes // size * chunk))
    for start in range(0, size, step):
        cut = (slice(None),) * axis + (slice(start, min(start + step, size)),)
        array[(*index, *cut)].write(part[cut].astype(dtype)).result()


def write_released(source: Source, out: Path, gating: str, dtype: np.dtype | None = None) -> None:
    """The released Flax layout: an Orbax checkpoint of {"transformer/layer_0/attn/q_einsum": {"w": ...}, ...}."""
    model = source.model
    table = layout.released(model, gating)
    shapes = {}
    found = {place.tensor: place for place in layout.places(model, table)}
    for tensor, shape in layout.tensor_shapes(model, table).items():
        kind = dtype or source.dtype(found[tensor].slot.leaf)
        dims = "2" * (len(shape) - len(found[tensor].stored)) + found[tensor].stored
        shapes[tuple(tensor.rsplit("/", 1))] = (shape, kind, arrays.chunk_shape(dims, shape, kind.itemsize))
    made = arrays.create(out, shapes)
    for place in layout.places(model, table):
        path = tuple(place.tensor.rsplit("/", 1))
        array, kind = made[path], shapes[path][1]
        if place.slot.leaf == EMBEDDING:
            for rows in row_blocks(source, kind):
                array[rows].write(cast(place.tensor, source.read(place.slot, rows), kind)).result()
        else:
            part = cast(place.tensor, layout.to_stored(model, place, source.read(place.slot)), kind)
            write_part(array, () if place.index is None else (place.index,), place.stored, part, kind)


def write_hf(source: Source, out: Path, shard_bytes: int, dtype: np.dtype | None = None) -> None:
    """A folder that transformers' `from_pretrained` loads as it is. Raises ConfigError where it could not."""
    model = source.model
    config = hf_config.write(model, (dtype or source.dtype(EMBEDDING)).name)
    places = {place.tensor: place for place in layout.places(model, layout.HF)}
    kinds = {name: dtype or source.dtype(place.slot.leaf) for name, place in places.items()}
    tensors = {name: (shape, kinds[name]) for name, shape in layout.tensor_shapes(model, layout.HF).items()}
    groups = hf.shards(tensors, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = [hf.SINGLE] if len(groups) == 1 else names
    for name, group in zip(names, groups, strict=True):
        hf.write_shard(out / name, group, (b for t in group for b in stored_blocks(source, places[t], kinds[t])))
    if len(groups) > 1:
        weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        size = sum(hf.size_bytes(*tensor) for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (out / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, value in (("config.json", config), ("generation_config.json", hf_config.generation(model))):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")


def stored_blocks(source: Source, place: Place, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor in the order of its bytes, a block at a time."""
    if place.slot.leaf == EMBEDDING:
        for rows in row_blocks(source, dtype):
            yield cast(place.tensor, source.read(place.slot, rows), dtype)
        return
    part = layout.to_stored(source.model, place, source.read(place.slot))
    step = max(1, BLOCK_BYTES // max(1, part[:1].size * dtype.itemsize))
    for start in range(0, len(part), step):
        yield cast(place.tensor, part[start : start + step], dtype)


def copy_sidecars(folder: Path, out: Path) -> list[str]:
    """The tokenizer's files and the like, where a folder has them; returns their names."""
    copied = [name for name in SIDECARS if (folder / name).is_file()]
    if copied:
        out.mkdir(exist_ok=True)
    for name in copied:
        shutil.copyfile(folder / name, out / name)
    return copied


def released_gating(model: Model) -> str:
    """Of the released sizes only 2B has [2, D, F]; known by its width, as an import may have lost its name."""
    return "DF" if model.width == 2304 else "FD"
