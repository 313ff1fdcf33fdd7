"""Compiled programs kept on disk, one file a rank.

JAX's own persistent cache is written by process 0 only, and elsewhere than on TPU the other ranks then miss it and
compile again while rank 0 waits in its first collective. Keyed by the source of this package, a hit also saves
the trace.
"""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from gemma.versions import packages, source_digest


def key(name: str, facts: tuple[Any, ...]) -> str:
    """Names a compiled program by all it depends on; `facts` are the config leaves it was built from."""
    flags = [os.environ.get(v, "") for v in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    devices = [jax.device_count(), jax.local_device_count(), jax.process_count(), jax.process_index()]
    versions = [packages("jax", "jaxlib", "flax", "optax", "tokamax"), jax.devices()[0].client.platform_version]
    numerics = [jax.config.values[v] for v in ("jax_default_matmul_precision", "jax_enable_x64")]
    seen = repr([name, facts, flags, devices, versions, numerics, jax.devices()[0].device_kind, source_digest()])
    return f"{name}-{hashlib.sha256(seen.encode()).hexdigest()[:24]}"


def compiled(name: str, jitted: Any, args: tuple[Any, ...], facts: tuple[Any, ...], cache: Path) -> tuple[Any, bool]:
    """The compiled program and whether it came from the cache. Anything unreadable there is compiled anew."""
    path = cache / "compiled" / key(name, facts)
    if path.exists():
        try:
            payload, in_tree, out_tree = pickle.loads(path.read_bytes())
            return serialize_executable.deserialize_and_load(payload, in_tree, out_tree), True
        except Exception as error:  # a torn file, another CPU: the compiler is the fallback
            print(f"compiled program {path} is unusable, compiling anew: {error!r}")
    program = jitted.lower(*args).compile()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
        partial.rename(path)
    except OSError as error:  # the next attempt compiles anew
        print(f"compiled program {path} is not kept: {error!r}")
    return program, False
