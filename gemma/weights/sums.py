"""Checksums of a checkpoint's arrays, those of `gemma.checkpoint.checksums`, in NumPy.

Those are computed on devices, over arrays that lie there whole. Here the arrays are on disk and larger than memory, so
they are read, or written, in runs: elements that follow each other in the order of the array. The sums of an array are
the sums of its runs added up, modulo 2^32, however it is cut.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma.weights.layout import WeightsError
from gemma.weights.small_json import read_json

METADATA = "_CHECKPOINT_METADATA"  # Orbax's own name, beside the folder of the arrays
OTHER = 0x9E3779B9
RUN_BYTES = 8 << 20  # of an array in memory at a time
BLOCK = 1 << 18  # elements that are summed at a time: what is computed on the way takes some multiples of it
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element


def noted(folder: Path) -> dict[str, str]:
    """What was noted at the save, by name. folder: of the arrays. Raises WeightsError where there is nothing: then
    nobody can know whether they are what was saved.
    """
    path = folder.parent / METADATA
    found = read_json(path)
    try:
        sums = {str(name): str(value) for name, value in found["custom_metadata"]["sums"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path.name} holds no checksums of the arrays") from error
    if not sums:
        raise WeightsError(f"{path.name} holds no checksums of the arrays")
    return sums


def note(folder: Path, sums: Mapping[str, np.ndarray]) -> None:
    """Writes what `noted` reads."""
    text = {name: as_hex(total) for name, total in sums.items()}
    (folder.parent / METADATA).write_text(json.dumps({"custom_metadata": {"sums": text}}) + "\n")


def check(folder: Path, arrays: Mapping[str, Any], prefix: str) -> None:
    """Reads every array once. arrays: TensorStore's, by leaf. Raises WeightsError naming the first that differs."""
    saved = noted(folder)
    for leaf, array in arrays.items():
        name = f"{prefix}.{leaf}"
        if saved.get(name) != sum_of(array, name):
            raise WeightsError(f"{name} is not what was saved, by its checksum")


def sum_of(array: Any, name: str) -> str:
    """Both sums of an array in hexadecimal. Raises WeightsError where it cannot be read."""
    total = np.zeros(2, np.uint32)
    for index, first in runs(tuple(array.shape), array.dtype.numpy_dtype.itemsize):
        try:
            values = array[index].read().result()
        except (ValueError, OSError) as error:
            raise WeightsError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
        total += sum_of_run(np.asarray(values), first)
    return as_hex(total)


def runs(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Cuts an array: the index of each run, and the number of elements before it."""
    inner = [int(np.prod(shape[axis:], dtype=np.int64)) for axis in range(len(shape) + 1)]  # elements below an axis
    axis = next(axis for axis in range(len(shape) + 1) if inner[axis] * itemsize <= RUN_BYTES or axis == len(shape))
    if axis == 0:
        yield (), 0
        return
    step = max(1, RUN_BYTES // max(1, inner[axis] * itemsize))
    for at in itertools.product(*map(range, shape[: axis - 1])):
        before = sum(i * inner[n + 1] for n, i in enumerate(at))
        for start in range(0, shape[axis - 1], step):
            yield (*at, slice(start, min(start + step, shape[axis - 1]))), before + start * inner[axis]


def sum_of_run(values: np.ndarray, first: int) -> np.ndarray:
    """uint32 [2] of elements that follow each other in an array. first: the number of elements before them."""
    flat = np.ascontiguousarray(values).reshape(-1)
    total = np.zeros(2, np.uint32)
    for start in range(0, flat.size, BLOCK):
        bits = flat[start : start + BLOCK].view(BITS[flat.itemsize]).astype(np.uint32)
        index = np.arange(bits.size, dtype=np.uint32) + np.uint32((first + start) % 2**32)  # counted modulo 2^32
        one = mixed(bits ^ mixed(index))
        two = mixed(one + np.uint32(OTHER))
        total += np.array([one.sum(dtype=np.uint32), two.sum(dtype=np.uint32)], np.uint32)
    return total


def mixed(x: np.ndarray) -> np.ndarray:
    """As `gemma.checkpoint.checksums.mixed`: modulo 2^32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def as_hex(total: np.ndarray) -> str:
    return f"{total[0]:08x}{total[1]:08x}"
