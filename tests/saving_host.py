"""One of two hosts that save together: `python -m tests.saving_host RANK PORT FOLDER RANK_THAT_FAILS BYTES`.

Saves step 1; step 2 while no file of one host may grow beyond BYTES; then, without that limit, steps 2 and 3. Prints
a line of JSON for each save: what `save` said, what `poll` told afterwards, seconds, and the steps on disk.
"""

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

from gemma import saving
from gemma.config import Checkpoint

WORDS = 1 << 18


class State(NamedTuple):
    """Random, so that it does not shrink when it is written."""

    step: jax.Array
    weights: jax.Array


def main(rank: int, port: int, folder: Path, fails: int, limit: int) -> None:
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
    saver = saving.open_saver(folder, config, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    for step, limited in ((1, False), (2, True), (2, False), (3, False)):
        resource.setrlimit(
            resource.RLIMIT_FSIZE,
            (limit if limited and rank == fails else resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        )
        started = time.monotonic()
        problem = saving.save(saver, step, state)  # type: ignore[arg-type]
        settled = saving.settle(saver, 60.0)
        failed = saving.poll(saver)
        saver.votes.meet(f"looked-{step}-{limited}", 60_000)
        found = {
            "step": step,
            "problem": problem,
            "settled": settled,
            "failed": failed and [failed.step, failed.problem],
            "seconds": time.monotonic() - started,
            "disk": sorted(os.listdir(folder)),
        }
        saver.votes.meet(f"told-{step}-{limited}", 60_000)
        os.write(1, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
