"""One host's part of an evaluation, behind the verbs the controller speaks: restore, run, wait.

An evaluation's step is a batch of held-out rows: step n means n batches answered. The weights never change, so a batch
has the same loss whenever it is computed, and nothing that was answered is computed again.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gemma.config import Program
from gemma.messages import Opened, Ran, Restored, Row
from gemma.model import load
from gemma.model.sharding import make_mesh
from gemma.plan import flops
from gemma.text.tokens import open_tokens
from gemma.train import aot, data
from gemma.train.step import functions


class Evaluator:
    """Holds a host's share of the weights between verbs."""

    def __init__(self, program: Program, folder: Path, cache: Path):
        """Opens the data and compiles or loads the program. folder: the run directory, shared by all hosts."""
        assert program.evaluate is not None
        self.program, self.what = program, program.evaluate
        started = time.monotonic()
        tokens = open_tokens(program.data, cache, program.model.vocab)
        self.meta = tokens.meta
        self.dataset = data.open_dataset(tokens, program.data, program.train.batch, program.train.seed)
        opened = time.monotonic()
        self.functions = functions(program, make_mesh(program.mesh))
        self.abstract = self.functions.state.params
        p, t = program, program.train
        built_from = (p.model, p.mesh, p.data.sequence, t.batch, t.dtype, t.accumulation, t.remat, t.loss_chunk)
        arguments = (self.abstract, self.functions.batch)
        self.eval, self.cached = aot.compiled("eval", self.functions.eval, arguments, built_from, cache)
        self.seconds = {"data": opened - started, "compile": time.monotonic() - opened}
        self.params: Any = None
        self.batches = min(program.eval.batches, -(-len(self.dataset.eval) // self.dataset.batch))

    def opened(self) -> Opened:
        return Opened(share_key="", share_bytes=0)

    def restore(self, step: int) -> Restored:
        """Stands ready after `step` answered batches, the weights on the devices. Raises WeightsError."""
        started = time.monotonic()
        if self.params is None:
            self.params = jax.block_until_ready(load.load_params(self.what.weights, self.abstract, self.what.step))
        self.seconds["restore"] = time.monotonic() - started
        model, batch, sequence = self.program.model, self.dataset.batch, self.program.data.sequence
        return Restored(
            step=step,
            fresh=step == 0,
            fingerprint=self.meta.fingerprint,
            bytes_per_target=self.meta.bytes_per_target,
            step_flops=flops.step_flops(model, batch, sequence) // 3,  # forward only: the backward pass is twice that
            compile_cached=self.cached,
            platform=jax.devices()[0].platform,
            seconds=dict(self.seconds),
            steps=self.batches,
        )

    def run(self, first: int, last: int) -> Ran:
        """Batches first..last-1. One is dispatched before the one before it is waited for."""
        rows: list[Row] = []
        flight: list[tuple[int, Any]] = []
        self.since = time.monotonic()
        for index in range(first, last):
            tokens = data.place(self.functions.batch, partial(self.dataset.eval_rows, index))
            flight.append((index + 1, self.eval(self.params, tokens)))
            if len(flight) > 1:
                rows.append(self.answered(*flight.pop(0)))
        rows += [self.answered(*one) for one in flight]
        return Ran(tuple(rows), bad=(), halted=False, snapshots=0, wait_s=0.0, data_s=0.0)

    def answered(self, step: int, sums: tuple[jax.Array, jax.Array]) -> Row:
        """Waits for a batch: its summed loss in nats and its number of targets, exactly as they were computed."""
        loss_sum, targets = (float(x) for x in jax.device_get(sums))
        now = time.monotonic()
        took_s, self.since = now - self.since, now
        metrics = {"loss": loss_sum / max(targets, 1.0), "loss_sum": loss_sum, "targets": targets}
        return Row(step, metrics, took_s, time.time())

    def trouble(self) -> None:
        """Nothing is saved, so no save fails."""

    def wait(self, wait_s: float = 0.0) -> bool:
        """Nothing is written in the background."""
        return True
