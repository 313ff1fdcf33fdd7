"""One host's part of a run, behind the few verbs the controller speaks: restore, run, save, evaluate, wait.

Every host calls every verb with the same arguments in the same order; that is what SPMD asks. Runs by itself on a
bare machine too: `Trainer(program, folder, cache)` in one process is the whole run without a controller.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gemma import aot, checkpoint, data, flops, weights
from gemma.config import Program
from gemma.reports import Restored, Row
from gemma.sharding import make_mesh
from gemma.step import TrainState, functions
from gemma.tokens import open_tokens


class Trainer:
    """Holds a host's share of the arrays between verbs."""

    def __init__(self, program: Program, folder: Path, cache: Path):
        """Compiles or loads the programs and opens the data. folder: the run directory, shared by all hosts."""
        self.program, self.folder, self.cache = program, folder, cache
        self.seconds: dict[str, float] = {}
        self.mesh = make_mesh(program.mesh)
        started = time.monotonic()
        tokens = open_tokens(program.data, cache, program.model.vocab)
        self.meta = tokens.meta
        self.dataset = data.open_dataset(tokens, program.data, program.train.batch, program.train.seed)
        started = self.lap("data", started)
        self.functions = functions(program, self.mesh)
        self.train, self.cached = self.compile("train", (self.functions.state, self.functions.batch))
        self.eval: Any = None  # compiled when first asked for
        self.lap("compile", started)
        self.manager = checkpoint.open_manager(folder / "checkpoints", program.checkpoint)
        self.state: TrainState | None = None
        self.ready = time.monotonic()  # since when the next step is being waited for
        self.tracing = False

    def lap(self, phase: str, started: float) -> float:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now

    def compile(self, name: str, args: tuple[Any, ...]) -> tuple[Any, bool]:
        """Of the config only what the program is built from names it: another seed or length compiles nothing anew."""
        p = self.program
        train = (p.train.batch, p.train.dtype, p.train.accumulation, p.train.remat, p.train.loss_chunk)
        spikes = (p.guard.spike_sigmas, p.guard.warmup)
        built_from = {
            "init": (p.model, p.mesh, p.train.seed),
            "train": (p.model, p.mesh, p.data.sequence, *train, p.optim, p.train.steps, *spikes),
            "eval": (p.model, p.mesh, p.data.sequence, *train),
        }
        return aot.compiled(name, getattr(self.functions, name), args, built_from[name], self.cache)

    def restore(self, step: int | None) -> Restored:
        """Stands ready at a committed step; None initialises. Raises CheckpointError rather than start afresh."""
        started = time.monotonic()
        if step is None:
            self.state = self.initial()
            jax.block_until_ready(self.state.step)
        else:
            self.state = checkpoint.restore(self.manager, step, self.functions.state)
        self.ready = self.lap("restore", started)
        program = self.program
        return Restored(
            step=step or 0,
            fresh=step is None,
            fingerprint=self.meta.fingerprint,
            bytes_per_target=self.meta.bytes_per_target,
            step_flops=flops.step_flops(program.model, program.train.batch, program.data.sequence),
            compile_cached=self.cached,
            platform=jax.devices()[0].platform,
            seconds=dict(self.seconds),
        )

    def initial(self) -> TrainState:
        """Random weights, or those of train.init_from; the optimizer is fresh."""
        state: TrainState = self.compile("init", ())[0]()
        if self.program.train.init_from is None:
            return state
        jax.tree.map(lambda x: x.delete(), state.params)  # one copy of the weights at a time
        return state._replace(params=weights.load_params(self.program.train.init_from, self.functions.state.params))

    def run(self, first: int, last: int) -> list[Row]:
        """Steps first..last-1. A step is dispatched before the one before it is waited for."""
        assert self.state is not None
        rows: list[Row] = []
        flight: list[tuple[int, dict[str, jax.Array]]] = []
        for step in range(first, last):
            self.profile(step)
            tokens = data.place(self.functions.batch, partial(self.dataset.train_rows, step))
            self.state, metrics = self.train(self.state, tokens)
            flight.append((step + 1, metrics))
            if len(flight) > 1:
                rows.append(self.take(*flight.pop(0)))
        rows += [self.take(*entry) for entry in flight]
        self.profile_ends(last)
        return rows

    def take(self, step: int, metrics: dict[str, jax.Array]) -> Row:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        row, self.ready = Row(step, values, now - self.ready), now
        return row

    def profile(self, step: int) -> None:
        """Opens the profiler's trace before its first step, closes it before the first that is not its; host 0 only."""
        self.profile_ends(step)
        bounds = self.program.profile.steps
        if bounds and not self.tracing and bounds[0] <= step < bounds[1] and jax.process_index() == 0:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.tracing = True

    def profile_ends(self, step: int) -> None:
        """Closes the trace once `step` steps are done and that is all it was to hold."""
        if self.tracing and step >= min(self.program.profile.steps[1], self.program.train.steps):
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.tracing = False

    def evaluate(self) -> tuple[float, float]:
        """Mean held-out loss in nats over eval.batches batches, always the same ones; and the seconds it took."""
        assert self.state is not None
        started = time.monotonic()
        if self.eval is None:
            self.eval, _ = self.compile("eval", (self.functions.state.params, self.functions.batch))
        total = count = 0.0
        batches = min(self.program.eval.batches, -(-len(self.dataset.eval) // self.dataset.batch))
        for index in range(batches):
            tokens = data.place(self.functions.batch, partial(self.dataset.eval_rows, index))
            loss, targets = self.eval(self.state.params, tokens)
            total, count = total + float(loss), count + float(targets)
        self.ready = time.monotonic()
        return total / max(count, 1.0), self.ready - started

    def save(self, step: int) -> float:
        """Seconds training stood still; the commit follows in the background."""
        assert self.state is not None
        started = time.monotonic()
        checkpoint.save(self.manager, step, self.state)
        self.ready = time.monotonic()
        return self.ready - started

    def wait(self) -> None:
        """Returns once nothing is being written any more."""
        if self.tracing:  # stopped amid the steps to be traced
            jax.profiler.stop_trace()
            self.tracing = False
        self.manager.wait_until_finished()
