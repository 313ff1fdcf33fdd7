"""One host's part of an evaluation, behind the verbs the controller speaks: restore, run, wait.

An evaluation's step is a batch of held-out rows: step n means n batches answered. The weights never change, so a batch
has the same loss whenever it is computed, and nothing that was answered is computed again.
"""

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gemma.config import Program
from gemma.messages import Opened, Restored, Row, WindowResult
from gemma.model import load
from gemma.model.sharding import make_mesh
from gemma.plan import flops
from gemma.text import corpus
from gemma.text.corpus import Texts
from gemma.train import aot, data, held_out
from gemma.train.step import functions
from gemma.train.trainer import compile_key


class Evaluator:
    """Holds a host's share of the weights between verbs."""

    def __init__(self, program: Program, folder: Path, cache: Path, texts: Texts | None = None):
        """Compiles or loads the program. folder: the run directory, shared by all hosts. texts: None opens them."""
        assert program.evaluate is not None
        self.program, self.what = program, program.evaluate
        started = time.monotonic()
        self.texts = texts or corpus.open_texts(program.data, program.eval, cache, program.model.vocab)
        self.sets = held_out.eval_sets(program, self.texts)
        opened = time.monotonic()
        self.functions = functions(program, make_mesh(program.mesh))
        self.abstract = self.functions.state.params
        arguments = (self.abstract, self.functions.batch)
        self.eval, self.cached = aot.compiled(
            "eval", self.functions.eval, arguments, compile_key("eval", program), cache
        )
        self.seconds = {"data": opened - started, "compile": time.monotonic() - opened}
        self.params: Any = None
        size = program.train.batch
        self.batches = [(one, first) for one in self.sets for first in range(0, one.rows, size)]

    def opened(self) -> Opened:
        return Opened(share_key="", share_bytes=0)

    def restore(self, step: int) -> Restored:
        """Stands ready after `step` answered batches, the weights on the devices. Raises WeightsError."""
        started = time.monotonic()
        if self.params is None:
            self.params = jax.block_until_ready(load.load_params(self.what.weights, self.abstract, self.what.step))
        self.seconds["restore"] = time.monotonic() - started
        model, batch, sequence = self.program.model, self.program.train.batch, self.program.data.sequence
        own = self.texts.own.tokens.meta
        return Restored(
            step=step,
            fresh=step == 0,
            fingerprint=own.fingerprint,
            bytes_per_target=own.bytes_per_target,
            step_flops=flops.step_flops(model, batch, sequence) // 3,  # forward only: the backward pass is twice that
            compile_cached=self.cached,
            platform=jax.devices()[0].platform,
            seconds=dict(self.seconds),
            steps=len(self.batches),
            eval_fingerprints={name: text.tokens.meta.fingerprint for name, text in self.texts.sets.items()},
            warnings=corpus.warnings(self.texts),
            sets=Counter(one.name for one, _ in self.batches),
        )

    def run(self, first: int, last: int) -> WindowResult:
        """Batches first..last-1. One is dispatched before the one before it is waited for."""
        rows: list[Row] = []
        flight: list[tuple[int, Any]] = []
        self.since = time.monotonic()
        for index in range(first, last):
            one, row = self.batches[index]
            tokens = data.place(self.functions.batch, partial(held_out.batch_rows, one, row))
            flight.append((index + 1, self.eval(self.params, tokens)))
            if len(flight) > 1:
                rows.append(self.answered(*flight.pop(0)))
        rows += [self.answered(*one) for one in flight]
        return WindowResult(tuple(rows), bad=(), halted=False, snapshots=0, wait_s=0.0, data_s=0.0)

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
