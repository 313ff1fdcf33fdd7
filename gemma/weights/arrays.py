"""Arrays of an Orbax checkpoint, read and written in parts.

Orbax saves and restores whole arrays; a layer's weights are a slice of an array that holds all layers. So the arrays
are opened by TensorStore, the library under Orbax, where Orbax keeps them (a zarr array a leaf, in one OCDBT store),
and what is written here Orbax restores as its own. `_METADATA` is Orbax's description of the tree, as of 0.12.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gemma.weights.layout import WeightsError
from gemma.weights.small_json import read_json

KeyPath = tuple[str, ...]  # of a leaf in the tree
CHUNKS = 64  # of a part along its width, which `fsdp` cuts: a host reads little more than its share
CHUNK_BYTES = 64 << 10  # but none smaller than this
ROWS = 2048  # of the embedding in a chunk
# Nothing is kept in memory beyond the chunks under way.
LIMITS = {
    "cache_pool": {"total_bytes_limit": 0},
    "data_copy_concurrency": {"limit": 2},
    "file_io_concurrency": {"limit": 2},
}


@dataclass(frozen=True)
class Arrays:
    """An Orbax checkpoint's arrays by their path in the tree."""

    folder: Path
    names: frozenset[KeyPath]
    zarr3: bool
    ocdbt: bool
    context: ts.Context

    def open(self, path: KeyPath) -> Any:
        """The array, nothing of it read yet. Raises WeightsError."""
        try:
            return ts.open(spec(self.folder, path, self.zarr3, self.ocdbt), context=self.context, open=True).result()
        except ValueError as error:
            raise WeightsError(f"{'.'.join(path)} cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(" [")[0]


def spec(folder: Path, path: KeyPath, zarr3: bool, ocdbt: bool) -> dict[str, Any]:
    name = ".".join(path)
    if ocdbt:
        store: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{folder.absolute()}/{name}/"}
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}


def open_arrays(folder: Path) -> Arrays:
    """Raises WeightsError where the folder is no Orbax checkpoint."""
    try:
        metadata = read_json(folder / "_METADATA")
        trees = metadata["tree_metadata"].values()
        names = frozenset(tuple(str(key["key"]) for key in leaf["key_metadata"]) for leaf in trees)
    except (WeightsError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"no Orbax checkpoint in {folder}: _METADATA cannot be read ({error})") from error
    ocdbt = (folder / "manifest.ocdbt").exists()
    return Arrays(folder, names, bool(metadata.get("use_zarr3", False)), ocdbt, ts.Context(LIMITS))


def create(
    folder: Path, shapes: dict[KeyPath, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]]
) -> dict[KeyPath, Any]:
    """A new Orbax checkpoint of zeros: each path's shape, dtype and chunk; returns the arrays to be written."""
    folder.mkdir(exist_ok=True)
    context = ts.Context(LIMITS)
    arrays = {}
    for path, (shape, dtype, chunk) in shapes.items():
        metadata = {
            "shape": list(shape),
            "chunks": list(chunk),
            "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
            "compressor": None,
        }
        wanted = spec(folder, path, zarr3=False, ocdbt=True) | {"metadata": metadata}
        arrays[path] = ts.open(wanted, context=context, create=True).result()
    (folder / "_METADATA").write_text(json.dumps(tree_metadata({path: shapes[path][0] for path in shapes})))
    return arrays


def tree_metadata(shapes: dict[KeyPath, tuple[int, ...]]) -> dict[str, Any]:
    """What Orbax writes beside the arrays of a tree of dicts (key_type 2)."""
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
        for path, shape in shapes.items()
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def chunk_shape(dims: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """A chunk holds one part of one layer, cut along D; rows of the embedding are cut too. dims: a letter an axis."""
    chunk = [1 if dim in "P24" else size for dim, size in zip(dims, shape, strict=True)]
    if "V" in dims:
        chunk[dims.index("V")] = min(chunk[dims.index("V")], ROWS)
    at = dims.index("D")
    whole = math.prod(chunk) * itemsize
    parts = max(1, min(CHUNKS, whole // CHUNK_BYTES)) if len(dims.strip("P24")) > 1 else 1
    chunk[at] = -(-chunk[at] // parts)
    return tuple(chunk)
