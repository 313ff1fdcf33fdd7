"""The train step alone, on the first device of this process: no controller, no data, no checkpoints.

B batch, U = sequence + 1.
"""

import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from gemma.config import Checkpoint, Data, Eval, Guard, Mesh, Model, Optim, Profile, Program, Train
from gemma.train.step import functions


def program(model: Model, *, batch: int, sequence: int, dtype: str, remat: str, loss_chunk: int) -> Program:
    return Program(
        model=model,
        data=Data(
            source="stdlib",
            path=None,
            text_key="text",
            tokenizer="byte",
            sequence=sequence,
            eval_fraction=0.1,
            max_document_mb=128,
        ),
        mesh=Mesh(replica=1, fsdp=1, tensor=1),
        optim=Optim(
            lr=3e-4,
            schedule="cosine",
            warmup_steps=10,
            decay_steps=100,
            wsd_decay_steps=None,
            final_lr_ratio=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=Train(100, None, batch, 0, dtype, 1, remat, loss_chunk, None, "auto"),  # type: ignore
        eval=Eval(every=0, rows=8, sets=None, tasks=(), limit=None, data=None),
        checkpoint=Checkpoint(0, 0.0, 1, 0, "off", 0.01, 60.0),
        profile=Profile(steps=()),
        guard=Guard(action="skip", spike_sigmas=0.0, warmup=100, rollback_steps=1, budget=10),
        evaluate=None,
        serve=None,
    )


def run(program: Program, steps: int) -> Iterator[tuple[float, float]]:
    """(loss, seconds) of each step on random tokens, the loss fetched; prints what it compiles and holds."""
    grid = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(grid, ("replica", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    compiled = functions(program, mesh)
    started = time.monotonic()
    train = compiled.train.lower(compiled.state, compiled.batch).compile()
    temporary_gib = train.memory_analysis().temp_size_in_bytes / 2**30
    print(f"compiled in {time.monotonic() - started:.1f} s, {temporary_gib:.2f} GiB temporary", flush=True)
    state = compiled.init()
    print(f"parameters {sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))}", flush=True)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens_BU = rng.integers(4, program.model.vocab, compiled.batch.shape, np.int32)
        placed = jax.device_put(tokens_BU, compiled.batch.sharding)
        started = time.monotonic()
        state, metrics = train(state, placed)
        yield float(metrics["loss"]), time.monotonic() - started
