"""One of two hosts that save together: `python -m tests.saving_host RANK PORT FOLDER RANK_THAT_FAILS WHERE`.

Saves step 1; step 2 while one host fails; then, well again, steps 2 and 3. WHERE it fails: `probe` and `write` are
limits on the size of its files, `commit` is an error when the checkpoint is made whole. Prints a line of JSON for
each save: what `poll` told afterwards, seconds, and the steps on disk.
"""

import errno
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint._src.path import atomicity

from gemma.checkpoint import saving
from gemma.config import Checkpoint

WORDS = 1 << 18
LIMITS = {"probe": 100, "write": 5000}  # bytes of a file


async def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class State(NamedTuple):
    """Random, so that it does not shrink when it is written."""

    step: jax.Array
    weights: jax.Array


def main(rank: int, port: int, folder: Path, fails: int, where: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    words = np.random.default_rng(0).normal(size=WORDS).astype(np.float32)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    weights = jax.make_array_from_callback((WORDS,), cut, lambda index: words[index])
    one = jax.make_array_from_callback(
        (), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), lambda _: jnp.int32(1)
    )
    state = State(one, weights)
    config = Checkpoint(
        every=0, every_minutes=0.0, keep_last=1, keep_every=0, snapshot="off", snapshot_cost=0.01, memory_idle_s=60.0
    )
    commit = atomicity.on_commit_callback
    saver = saving.open_saver(folder, config, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    for step, troubled in ((1, False), (2, True), (2, False), (3, False)):
        ill = troubled and rank == fails
        limit = LIMITS.get(where, resource.RLIM_INFINITY) if ill else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        atomicity.on_commit_callback = refuse if ill and where == "commit" else commit
        started = time.monotonic()
        saving.begin(saver, step, lambda: (state, None))  # type: ignore[arg-type, return-value]
        settled = saving.settle(saver, 60.0)
        failed = saving.poll(saver)
        saver.votes.meet(f"looked-{step}-{troubled}", 60_000)
        found = {
            "step": step,
            "settled": settled,
            "failed": failed and [failed.step, failed.problem],
            "seconds": time.monotonic() - started,
            "disk": sorted(os.listdir(folder)),
        }
        saver.votes.meet(f"told-{step}-{troubled}", 60_000)
        os.write(1, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
