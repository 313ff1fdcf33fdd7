"""The step without a controller: what one of two plain JAX processes does. Run by tests/bench/controller.py.

Usage: bare.py RANK HOSTS PORT STEPS WARMUP CONFIG.json CACHE FOLDER; rank 0 prints seconds a step.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax

from gemma.text.order import places
from gemma.train.data import place
from gemma.train.trainer import Trainer
from orchestrator.config import from_container


def main() -> None:
    rank, hosts, port, steps, warmup = map(int, sys.argv[1:6])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", hosts, rank)
    program = from_container(json.loads(Path(sys.argv[6]).read_text())).program
    trainer = Trainer(program, Path(sys.argv[8]), Path(sys.argv[7]).expanduser())
    trainer.restore(None)
    state, step_of, batch = trainer.state, trainer.train, trainer.functions.batch
    before = None
    for step in range(steps):
        tokens = place(batch, partial(trainer.dataset.train_rows, places(trainer.order, step)))
        state, metrics = step_of(state, tokens)
        if before is not None:
            float(before["loss"])
        before = metrics
        if step == warmup:
            jax.block_until_ready(metrics)
            started = time.monotonic()
    jax.block_until_ready(before)
    if rank == 0:
        print(f"seconds_a_step {(time.monotonic() - started) / (steps - 1 - warmup):.6f}", flush=True)


if __name__ == "__main__":
    main()
