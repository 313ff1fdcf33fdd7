"""Whether a checkpoint's arrays are what was saved: the sums of `gemma.checkpoint.checksums`, in NumPy.

Those are computed on devices, over arrays that lie there whole. Here the arrays are on disk and larger than memory, so
each is read in slabs; the sums do not depend on how an array is cut.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma.weights.layout import WeightsError

METADATA = "_CHECKPOINT_METADATA"  # Orbax's own name, beside the folder of the arrays
OTHER = 0x9E3779B9
SLAB_BYTES = 32 << 20
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element


def saved(folder: Path) -> dict[str, str]:
    """What was noted at the save, by leaf; empty where nothing was. folder: of the arrays. Raises WeightsError."""
    path = folder.parent / METADATA
    if not path.exists():
        return {}
    try:
        noted = json.loads(path.read_text())["custom_metadata"] or {}
        return {str(name): str(value) for name, value in noted.get("sums", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def check(folder: Path, arrays: dict[str, Any], prefix: str) -> None:
    """Reads every array once. arrays: TensorStore's, by leaf. Raises WeightsError naming the first that differs."""
    noted = saved(folder)
    for leaf, array in arrays.items():
        name = f"{prefix}.{leaf}"
        if noted and noted.get(name) != sum_of(array, name):
            raise WeightsError(f"{name} is not what was saved, by its checksum")


def sum_of(array: Any, name: str) -> str:
    """Both sums of an array in hexadecimal. Raises WeightsError where it cannot be read."""
    shape, size = tuple(array.shape), array.dtype.numpy_dtype.itemsize
    row_bytes = max(1, size * int(np.prod(shape[1:], dtype=np.int64)))
    rows = max(1, SLAB_BYTES // row_bytes)
    total = np.zeros(2, np.uint32)
    for first in range(0, shape[0] if shape else 1, rows):
        try:
            slab = np.asarray((array[first : min(first + rows, shape[0])] if shape else array).read().result())
        except (ValueError, OSError) as error:
            raise WeightsError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
        start = first * (row_bytes // size)
        index = np.arange(start, start + slab.size, dtype=np.uint64).astype(np.uint32)
        bits = np.ascontiguousarray(slab).reshape(-1).view(BITS[size]).astype(np.uint32)
        one = mixed(bits ^ mixed(index))
        two = mixed(one + np.uint32(OTHER))
        total += np.array([one.sum(dtype=np.uint32), two.sum(dtype=np.uint32)], np.uint32)
    return f"{total[0]:08x}{total[1]:08x}"


def mixed(x: np.ndarray) -> np.ndarray:
    """As `gemma.checkpoint.checksums.mixed`: modulo 2^32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
