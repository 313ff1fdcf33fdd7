"""What a host finds out about its chips before they train: how many, how much memory is free, whether they multiply
right and how fast, and whether all chips of all hosts reach each other.

I rows, J columns, K summed over.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma.checkpoint import checksums
from gemma.messages import ChipFacts
from gemma.train import aot

CHIP_SIZE = 8192  # of the product's sides: 2.4 ms of a v5p
SIMULATED_SIZE = 128  # of devices that share a processor: what it takes tells nothing, so it takes next to nothing
REPEATS = 5
EACH = PartitionSpec("chips")


def alone(chips: int, chips_in_all: int, cache: Path, spoilt: bool = False) -> ChipFacts:
    """No other host is waited for, but for the devices to come up. chips, chips_in_all: that should be here, and on
    all hosts; nothing is computed where they are not. spoilt: a rehearsal, this host's first chip multiplies wrong.
    """
    devices = jax.local_devices()
    simulated = devices[0].platform == "cpu"
    found = ChipFacts(devices[0].platform, len(devices), jax.device_count(), free_bytes(devices))
    if (found.chips, found.chips_in_all) != (chips, chips_in_all):
        return found
    mesh = every_chip()
    size, dtype = (SIMULATED_SIZE, "float32") if simulated else (CHIP_SIZE, "bfloat16")
    salts = salted(mesh, spoilt)
    product, _ = aot.compiled("product", multiplying(mesh, size, dtype), (salts,), (size, dtype), cache)
    products = tuple(np.asarray(part).tobytes().hex() for part in parts(product(salts)))
    seconds = () if simulated else shortest(product, salts)
    return ChipFacts(found.platform, chips, chips_in_all, found.free_bytes, products, seconds)


def meet(cache: Path) -> tuple[int, ...]:
    """Adds up the numbers of all chips, from 1, over all hosts: what each chip of this host was told."""
    mesh = every_chip()

    def told() -> jax.Array:
        return jax.lax.psum(jax.lax.axis_index("chips").astype(jnp.uint32) + 1, "chips")[None]

    jitted = jax.jit(jax.shard_map(told, mesh=mesh, in_specs=(), out_specs=EACH, check_vma=False))
    program, _ = aot.compiled("meet", jitted, (), (), cache)
    return tuple(int(np.asarray(part)[0]) for part in parts(program()))


def every_chip() -> Mesh:
    return Mesh(np.array(jax.devices()), ("chips",))


def free_bytes(devices: list[jax.Device]) -> tuple[int, ...]:
    """Of each device; nothing where the platform does not tell, as CPUs do not."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in one for one in stats):
        return ()
    return tuple(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats)


def multiplying(mesh: Mesh, size: int, dtype: str) -> Any:
    """The program: a number of each chip to the checksum of its product, uint32 [chips, 2].

    The factors hold whole numbers of -128..127, which need every bit of a bfloat16's fraction; their products are
    exact. A sum of 8192 products of any such numbers could reach 2^27, where float32 rounds (from 2^24 on). These
    are mixed like random ones, so sums have a deviation of 5e5 and stay below 4e6: they are exact in whatever order
    they are added, and right is one value only. That holds for these numbers and sizes, not for others.
    """

    def one(salt: jax.Array) -> jax.Array:
        rows, columns = (jax.lax.broadcasted_iota(jnp.uint32, (size, size), dim) for dim in (0, 1))
        at = rows * np.uint32(size) + columns + salt[0]
        a_IK, b_KJ = numbers(at, 0, dtype), numbers(at, size * size, dtype)
        a_IK, b_KJ = jax.lax.optimization_barrier((a_IK, b_KJ))  # made once, not for each block of the product
        c_IJ = jnp.matmul(a_IK, b_KJ, preferred_element_type=jnp.float32)
        return checksums.part_sums(c_IJ, c_IJ.shape, ((), ()))[None]

    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=EACH, out_specs=EACH, check_vma=False))


def numbers(at: jax.Array, first: int, dtype: str) -> jax.Array:
    """A whole number of -128..127 for each place."""
    return ((checksums.mixed(at + np.uint32(first)) >> 24).astype(jnp.int32) - 128).astype(dtype)


def salted(mesh: Mesh, spoilt: bool) -> jax.Array:
    """The same number for every chip; another one for one that shall multiply wrong."""
    first = jax.local_devices()[0]
    placed = [
        jax.device_put(np.array([spoilt and device == first], np.uint32), device) for device in jax.local_devices()
    ]
    return jax.make_array_from_single_device_arrays((mesh.size,), NamedSharding(mesh, EACH), placed)


def parts(x: jax.Array) -> list[jax.Array]:
    """Of this host's devices, in their order."""
    return [shard.data for shard in sorted(x.addressable_shards, key=lambda shard: shard.device.id)]


def shortest(program: Any, salts: jax.Array) -> tuple[float, ...]:
    """Seconds of each of this host's chips, the best of a few: a chip that is slow is slow each time."""
    return tuple(map(min, zip(*(times(partial(program, salts)) for _ in range(REPEATS)), strict=True)))


def times(dispatch: Any) -> list[float]:
    """Seconds until each chip was done."""
    started = time.monotonic()
    waiting = dict(enumerate(parts(dispatch())))
    done = [0.0] * len(waiting)
    while waiting:
        for chip in [chip for chip, part in waiting.items() if part.is_ready()]:  # type: ignore[attr-defined]
            done[chip] = time.monotonic() - started
            del waiting[chip]
    return done
