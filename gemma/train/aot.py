"""Compiled programs kept on disk, one file a rank.

JAX's own persistent cache is written by process 0 only, and elsewhere than on TPU the other ranks then miss it and
compile again while rank 0 waits in its first collective. Keyed by the source of this package, a hit also saves
the trace.
"""

import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from gemma.versions import packages, source_digest

# What the compilers read of the environment, and JAX of its own settings. Addresses of other processes
# (MEGASCALE_COORDINATOR_ADDRESS) are not among them: they differ from attempt to attempt and change no program.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_MEGACORE")
SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_use_shardy_partitioner",
)


def key(name: str, facts: tuple[Any, ...], devices: Sequence[jax.Device] | None = None) -> str:
    """Names a compiled program by all it depends on.

    facts: the config leaves it was built from. devices: those it is for, of all processes; this job's if not given.
    Their number is not enough: 16x16x24 and 8x24x32, or two slices and one twice as large, have as many chips, and
    other programs.
    """
    devices = jax.devices() if devices is None else devices
    flags = [os.environ.get(v, "") for v in FLAGS]
    settings = [jax.config.values[v] for v in SETTINGS]
    versions = [packages("jax", "jaxlib", "libtpu", "flax", "optax"), platform_version(devices[0])]
    places = [place(device) for device in devices]
    seen = repr([name, facts, flags, settings, versions, places, jax.process_index(), source_digest()])
    return f"{name}-{hashlib.sha256(seen.encode()).hexdigest()[:24]}"


def place(device: jax.Device) -> tuple[Any, ...]:
    """Where a device is: its process, slice, coordinates on the slice's torus and core, as far as it has them."""
    coords = tuple(getattr(device, "coords", None) or ())
    where = (getattr(device, "slice_index", None), coords, getattr(device, "core_on_chip", None))
    return (device.device_kind, device.id, device.process_index, *where)


def platform_version(device: jax.Device) -> str:
    """Of the runtime, which has the compiler in it; nothing for a device that is only described."""
    return str(getattr(device.client, "platform_version", ""))


def compiled(
    name: str,
    jitted: Any,
    args: tuple[Any, ...],
    facts: tuple[Any, ...],
    cache: Path,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Any, bool]:
    """The compiled program and whether it came from the cache. Anything unreadable there is compiled again.

    devices: those it is for, where they are not all of this job's.
    """
    path = cache / "compiled" / key(name, facts, devices)
    if path.exists():
        try:
            payload, in_tree, out_tree = pickle.loads(path.read_bytes())
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, execution_devices=devices
            ), True
        except Exception as error:  # a torn file, another CPU: the compiler is the fallback
            print(f"compiled program {path} is unusable, compiling again: {error!r}")
    program = jitted.lower(*args).compile()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
        partial.rename(path)
    except OSError as error:  # the next attempt compiles again
        print(f"compiled program {path} is not kept: {error!r}")
    return program, False
