"""A Hugging Face folder of safetensors, read and written a piece at a time."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma.config import Model
from gemma.weights import hf_config, layout
from gemma.weights.layout import Place, Slot, WeightsError
from gemma.weights.small_json import read_json, shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
# A file is mapped, and every page that was touched counts as memory until it is closed: so a block at a time.
BLOCK_BYTES = 8 << 20
HEAD = "lm_head.weight"  # the tied embedding once more, as some tools save it


@dataclass(frozen=True)
class HfSource:
    """A folder found whole: every tensor is there, with the shape the config gives it."""

    model: Model
    files: dict[str, Path]  # by tensor
    dtypes: dict[str, np.dtype]  # by our leaf
    places: dict[Slot, Place]

    def dtype(self, leaf: str) -> np.dtype:
        return self.dtypes[leaf]

    def read(self, slot: Slot, rows: slice = slice(None)) -> np.ndarray:
        """A part as we hold it; `rows` of the stored tensor's first axis."""
        place = self.places[slot]
        length = layout.stored_shape(self.model, place.stored)[0]
        start, stop, _ = rows.indices(length)
        stored = read_rows(self.files[place.tensor], place.tensor, start, stop)
        return layout.to_own(self.model, place, layout.finite(place.tensor, stored))


def read_rows(path: Path, tensor: str, start: int, stop: int) -> np.ndarray:
    """Rows start..stop-1 of a tensor, in memory of their own."""
    out: np.ndarray | None = None
    step = at = 0
    while at < stop - start or out is None:
        with safe_open(path, "numpy") as file:
            view = file.get_slice(tensor)
            if out is None:
                shape, dtype = view.get_shape(), DTYPES[view.get_dtype()]
                out = np.empty((stop - start, *shape[1:]), dtype)
                step = max(1, BLOCK_BYTES // max(1, out[:1].nbytes))
            end = min(at + step, stop - start)
            out[at:end] = view[start + at : start + end]
        at = end
    return out


def open_hf(folder: Path) -> HfSource:
    """Looks at every header, reads no weights. Raises ConfigError naming what is missing, extra or misshapen."""
    model = hf_config.read(folder)
    files = tensor_files(folder)
    want = layout.tensor_shapes(model, layout.HF)
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in dict.fromkeys(files.values()):
        found |= header(path, [name for name, file in files.items() if file == path])
    layout.match(want, {name: shape for name, (shape, _) in found.items() if name != HEAD})
    dtypes: dict[str, np.dtype] = {}
    for place in layout.places(model, layout.HF):
        name = found[place.tensor][1]
        if name not in DTYPES:
            raise WeightsError(f"{place.tensor} is {name}; allowed are {', '.join(DTYPES)}")
        if dtypes.setdefault(place.slot.leaf, DTYPES[name]) != DTYPES[name]:
            raise WeightsError(f"{place.tensor} is {name}, the same of other layers is not: they must be alike")
    places = {place.slot: place for place in layout.places(model, layout.HF)}
    if HEAD in files:
        check_tied(files, want["model.embed_tokens.weight"][0])
    return HfSource(model, files, dtypes, places)


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by model.safetensors or else the index. Raises WeightsError."""
    single = folder / SINGLE
    if single.is_file():
        return dict.fromkeys(header(single), single)
    if not (folder / INDEX).exists():
        raise WeightsError(f"neither {SINGLE} nor {INDEX} is there")
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        files = {str(name): folder / str(file) for name, file in weight_map.items()}
        missing = next((n for n, path in files.items() if path.parent != folder or not path.is_file()), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # OSError: a name that no file can have
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{INDEX} cannot be read: {error!r}"[:300]) from error
    if missing is not None:
        raise WeightsError(f"{INDEX} puts {shown(missing)} into {shown(files[missing].name)}, which is missing")
    return files


def header(path: Path, names: list[str] | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a file, which must hold `names`. Raises WeightsError; a short file is one."""
    try:
        with safe_open(path, "numpy") as file:
            there = set(file.keys())
            for name in sorted(set(names or ()) - there):
                raise WeightsError(f"{path.name} lacks {name}, which {INDEX} puts there")
            for name in sorted(there - set(names)) if names is not None else ():
                raise WeightsError(f"{path.name} holds {name}, which {INDEX} does not list")
            views = {name: file.get_slice(name) for name in there}
            return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path.name} is cut off or no safetensors file: {error}") from error


def check_tied(files: dict[str, Path], rows: int) -> None:
    """An output layer of its own is not Gemma 2's. Raises WeightsError."""
    tied, step = "model.embed_tokens.weight", 4096
    for start in range(0, rows, step):
        both = [read_rows(files[name], name, start, min(start + step, rows)) for name in (tied, HEAD)]
        if both[0].tobytes() != both[1].tobytes():
            raise WeightsError(f"{HEAD} differs from {tied}; Gemma 2 ties them")


Tensors = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by name, in order


def size_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def shards(tensors: Tensors, limit: int) -> list[Tensors]:
    """Tensors in order, a dict a file; a file is at most `limit` bytes, or one tensor."""
    out: list[Tensors] = [{}]
    held = 0
    for name, (shape, dtype) in tensors.items():
        size = size_bytes(shape, dtype)
        if out[-1] and held + size > limit:
            out.append({})
            held = 0
        out[-1][name] = (shape, dtype)
        held += size
    return out


def write_shard(path: Path, tensors: Tensors, blocks: Iterator[np.ndarray]) -> None:
    """A safetensors file, written as the blocks come: a length, a JSON header, then the tensors' bytes in order.

    The library's own writer wants a whole file's tensors in memory at once.
    Format: github.com/huggingface/safetensors, README.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + size_bytes(shape, dtype)
        entries[name] = {"dtype": NAMES[dtype.name], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in blocks:
            file.write(np.ascontiguousarray(block).view(np.uint8).data)
    header(path, list(tensors))  # the library reads what was written
