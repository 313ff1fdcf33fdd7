"""One host's part of a run, behind the few verbs the controller speaks: restore, run, save, evaluate, wait.

Every host calls every verb with the same arguments in the same order; that is what SPMD asks. Runs by itself on a
bare machine too: `Trainer(program, folder, cache)` in one process is the whole run without a controller.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gemma.checkpoint import checksums, disk, saving, snapshot
from gemma.checkpoint.snapshot import Packed, SnapshotWriter
from gemma.checkpoint.votes import VOTE_S
from gemma.config import Program
from gemma.engine.forward import NORMS, Shape, unstacked
from gemma.memory import slots
from gemma.memory.wire import Address, Source
from gemma.messages import (
    BadStep,
    Evaluated,
    Opened,
    Restored,
    Row,
    SaveBegun,
    SaveFailed,
    Scores,
    SnapshotsBegun,
    WindowResult,
)
from gemma.model import load
from gemma.model.sharding import make_mesh
from gemma.plan import flops
from gemma.score.blocks import Blocks
from gemma.text import corpus
from gemma.text import order as orders
from gemma.text.corpus import Texts
from gemma.text.order import Order
from gemma.train import aot, data, held_out
from gemma.train.step import TrainState, functions

OVERLAPPED = 0.8  # of a step still runs on the devices when the host starts the next batch
IN_A_ROW = 3  # bad steps: then the state is bad, not the batch
PACKINGS = 10  # timed before snapshots begin: the shortest is what one costs


def compile_key(name: str, program: Program) -> tuple[Any, ...]:
    """The config leaves that a compiled program depends on: another seed or length compiles nothing again."""
    p = program
    train = (p.train.batch, p.train.dtype, p.train.accumulation, p.train.remat, p.train.loss_chunk)
    reduced = p.train.gradients_in
    spikes = (p.guard.spike_sigmas, p.guard.warmup)
    return {
        "init": (p.model, p.mesh, p.train.seed),
        "train": (p.model, p.mesh, p.data.sequence, *train, reduced, p.optim, *spikes),
        "eval": (p.model, p.mesh, p.data.sequence, *train),
        **dict.fromkeys(("pack", "unpack", "sums", "copy"), (p.model, p.mesh, p.optim)),
    }[name]


def unstacked_in(shape: Shape, params: Any) -> Any:
    """The parameters as requests are computed with them: in the compute dtype, but for the norms."""
    dtype = jax.numpy.dtype(shape.dtype)

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        kept = any(str(getattr(key, "key", key)) in NORMS for key in path)
        return leaf if kept else leaf.astype(dtype)

    return unstacked(jax.tree_util.tree_map_with_path(cast, params), shape)


class Trainer:
    """Holds a host's share of the arrays between verbs."""

    def __init__(self, program: Program, folder: Path, cache: Path, texts: Texts | None = None):
        """Compiles or loads the programs. folder: the run directory, shared by all hosts. texts: None opens them."""
        self.program, self.folder, self.cache = program, folder, cache
        self.seconds: dict[str, float] = {}
        self.mesh = make_mesh(program.mesh)
        started = time.monotonic()
        self.texts = texts or corpus.open_texts(program.data, program.eval, cache, program.model.vocab)
        tokens = self.texts.own.tokens
        self.meta = tokens.meta
        self.dataset = data.open_dataset(tokens, program.data, program.train.batch, program.train.seed)
        self.eval_sets = held_out.eval_sets(program, self.texts)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # a full disk does not stop a run
                corpus.record(self.texts, folder / "data.json")
        started = self.lap("data", started - texts.seconds if texts else started)
        self.functions = functions(program, self.mesh)
        self.packing = dict(zip(("pack", "unpack"), snapshot.packing(self.functions.state, self.mesh), strict=True))
        self.packing["sums"] = checksums.summing(self.functions.state, self.mesh)
        self.packing["copy"] = saving.copying(self.functions.state)
        self.flat = snapshot.flat_shape(self.functions.state, self.mesh)
        self.share = snapshot.share_of(self.functions.state, self.mesh)
        self.beside = snapshot.fits_beside(4 * self.share.words, snapshot.device_bytes())
        self.train, self.cached = self.compile("train", (self.functions.state, self.functions.batch))
        self.made: dict[str, Any] = {}
        self.eval: Any = None  # compiled when first asked for
        self.lap("compile", started)
        self.keeping: SnapshotWriter | None = None
        self.attempt = 0
        self.order = Order(((0, program.train.batch),))
        self.bad: list[BadStep] = []  # of the window
        self.halted = False
        self.rows: list[Row] = []  # that the controller may not have been told of
        self.evals: list[Evaluated] = []
        self.saver = saving.open_saver(folder / "checkpoints", program.checkpoint, self.functions.state)
        self.state: TrainState | None = None
        self.ready = time.monotonic()  # since when the next step is being waited for
        self.tracing = False

    def lap(self, phase: str, started: float) -> float:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now

    def compile(self, name: str, args: tuple[Any, ...]) -> tuple[Any, bool]:
        jitted = self.packing[name] if name in self.packing else getattr(self.functions, name)
        return aot.compiled(name, jitted, args, compile_key(name, self.program), self.cache)

    def opened(self) -> Opened:
        return Opened(self.share.key, self.share.bytes)

    def restore(
        self, step: int | None, source: Source | None = None, order: Order | None = None, again: bool = False
    ) -> Restored:
        """Stands ready at a step: of a snapshot where a source is given, else committed on disk; None initialises.

        order: which rows the steps train on; None is a run that has known one batch and skipped nothing.
        again: deletes what was saved beyond the step; the run replaces it.
        Raises CheckpointError rather than start afresh, SnapshotError where a snapshot is gone or damaged.
        """
        started = time.monotonic()
        self.rows, self.evals = [], []
        self.order = order or Order(((0, self.program.train.batch),))
        self.bad, self.halted = [], False
        self.state = None  # gone before the new one comes: there is no room for two
        if again:
            saving.drop_after(self.saver, step or 0)
        if step is None:
            self.state = self.initial()
        elif source is None:
            self.state = disk.restore(self.saver.manager, step, self.functions.state, self.of_state("sums"))
        else:
            self.state = self.recovered(step, source)
        jax.block_until_ready(self.state.step)
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
            steps=program.train.steps,
            eval_fingerprints={name: text.tokens.meta.fingerprint for name, text in self.texts.sets.items()},
            warnings=corpus.warnings(self.texts),
            rows=tuple(self.rows),
            evals=tuple(self.evals),
        )

    def of_state(self, name: str) -> Any:
        """A program that takes a state, compiled when first asked for."""
        if name not in self.made:
            self.made[name], _ = self.compile(name, (self.functions.state,))
        return self.made[name]

    def recovered(self, step: int, source: Source) -> TrainState:
        """The state out of host memory, and what was noted with it."""
        unpack, _ = self.compile("unpack", (self.flat,))
        state, noted = snapshot.restore(source, step, self.share, self.mesh, unpack, self.flat)
        self.rows = [Row(**row) for row in noted["rows"]]
        self.evals = [Evaluated(**found) for found in noted["evals"]]  # their sets as lists: JSON has no tuples
        return state

    def keep(self, path: str, buddy: Address | None, attempt: int) -> SnapshotsBegun:
        """Snapshots go to this host's slots and its buddy's from now on, the first at once; `attempt` with each."""
        assert self.state is not None
        started = time.monotonic()
        pack = self.of_state("pack")
        self.compile("unpack", (self.flat,))  # a recovery finds it in the cache
        self.keeping, self.attempt = SnapshotWriter(self.share, self.mesh, path, buddy), attempt
        step = int(self.state.step)
        times = [time.monotonic()]
        for _ in range(PACKINGS):
            packed = jax.block_until_ready(pack(self.state))
            times.append(time.monotonic())
        if step not in slots.held(self.keeping.slots):
            self.keeping.hand_over(step, packed, partial(snapshot.noted, attempt, tuple(self.rows), tuple(self.evals)))
            self.keeping.settle()
        slots.tell_progress(self.keeping.slots, step)
        self.ready = time.monotonic()
        return SnapshotsBegun(min(b - a for a, b in itertools.pairwise(times)), self.ready - started)

    def initial(self) -> TrainState:
        """Random weights, or those of train.init_from; the optimizer is fresh."""
        state: TrainState = self.compile("init", ())[0]()
        if self.program.train.init_from is None:
            return state
        jax.tree.map(lambda x: x.delete(), state.params)  # one copy of the weights at a time
        return state._replace(params=load.load_params(self.program.train.init_from, self.functions.state.params))

    def run(self, first: int, last: int, reported: int, every: int) -> WindowResult:
        """Steps first..last-1. A step is dispatched before the one before it is waited for.

        reported: results up to this step are written down. every: a snapshot each so many steps; 0 is off.
        """
        assert self.state is not None
        self.rows = [row for row in self.rows if row.step > reported]
        self.evals = [found for found in self.evals if found.step > reported]
        count, keeping, self.bad = len(self.rows), self.keeping, []
        snapshots, data_s, stood_s = 0, 0.0, 0.0
        waited_s = keeping.waited_s if keeping else 0.0
        flight: list[tuple[int, dict[str, jax.Array], Packed | None]] = []
        for step in range(first, last):
            if self.halted:
                break
            self.profile(step)
            places, started = orders.places(self.order, step), time.monotonic()
            tokens = data.place(self.functions.batch, partial(self.dataset.train_rows, places))
            hidden_s = OVERLAPPED * self.rows[-1].step_s if self.rows else math.inf
            data_s += max(0.0, time.monotonic() - started - hidden_s)
            self.state, metrics = self.train(self.state, tokens)
            due = keeping is not None and every > 0 and (step + 1) % every == 0
            snapshots += due
            flight.append((step + 1, metrics, self.of_state("pack")(self.state) if due else None))
            if len(flight) > 1:
                self.finish_step(*flight.pop(0))
            if keeping and due and not self.beside:
                self.finish_step(*flight.pop(0))
                stood_s += self.wait_for_snapshot(keeping)
        for entry in flight:
            self.finish_step(*entry)
        if self.halted and keeping:
            keeping.settle()  # else a step that the run goes back from could be held after it has gone back
        self.profile_ends(last)
        hidden_s = snapshots * OVERLAPPED * self.rows[-1].step_s if self.rows else 0.0  # devices had a step to do
        wait_s = stood_s + max(0.0, keeping.waited_s - waited_s - hidden_s) if keeping else 0.0
        return WindowResult(tuple(self.rows[count:]), tuple(self.bad), self.halted, snapshots, wait_s, data_s)

    def wait_for_snapshot(self, keeping: SnapshotWriter) -> float:
        """Until the snapshot is off the devices; returns the seconds."""
        keeping.settle()
        since, self.ready = self.ready, time.monotonic()
        return self.ready - since

    def finish_step(self, step: int, metrics: dict[str, jax.Array], packed: Packed | None) -> None:
        """Waits for a step; its snapshot is brought to memory from here on, if it is good."""
        if self.halted:
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        self.rows.append(Row(step, values, now - self.ready, time.time()))
        self.ready = now
        if not values["ok"]:
            self.note_bad_step(step)
        if self.keeping:
            slots.tell_progress(self.keeping.slots, step)
            if packed is not None and values["ok"]:
                results = partial(snapshot.noted, self.attempt, tuple(self.rows), tuple(self.evals))
                self.keeping.hand_over(step, packed, results)

    def note_bad_step(self, step: int) -> None:
        """Records a bad step and its batch; halts unless the step may be skipped. All hosts decide alike."""
        places = orders.places(self.order, step - 1) if jax.process_index() == 0 else []
        self.bad.append(BadStep(step, orders.spans(self.order, step - 1), tuple(data.row_ids(self.dataset, places))))
        last = [row.metrics["ok"] for row in self.rows[-IN_A_ROW:]]
        in_a_row = len(last) == IN_A_ROW and not any(last)
        self.halted = self.program.guard.action != "skip" or in_a_row

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

    def prepare(self) -> float:
        """Compiles or loads what `evaluate` runs, so that its own deadline need not allow for that. Returns seconds."""
        started = time.monotonic()
        if self.eval is None:
            self.eval, _ = self.compile("eval", (self.functions.state.params, self.functions.batch))
            self.ready = time.monotonic()
        return time.monotonic() - started

    def prepare_asking(self, digest: str) -> float:
        """Compiles or loads what `ask` runs; digest: of the requests that are meant. Returns seconds."""
        started = time.monotonic()
        shape = Shape(self.program.model, self.program.train.dtype, self.mesh)
        weights = self.functions.state.params
        self.asked = Blocks(self.folder, shape, weights, partial(unstacked_in, shape), self.cache)
        self.asked.check(digest)
        self.ready = time.monotonic()
        return self.ready - started

    def ask(self, steps: Sequence[tuple[int, ...]]) -> tuple[float, tuple[Scores, ...]]:
        """Seconds, and the scores of these blocks under the weights as they are."""
        assert self.state is not None
        started = time.monotonic()
        found = self.asked.score(self.state.params, steps)
        self.asked.drop_prefix()
        self.ready = time.monotonic()
        return self.ready - started, found

    def evaluate(self, step: int) -> Evaluated:
        """The loss of each held-out set, over the same rows every time."""
        assert self.state is not None
        self.prepare()
        started = time.monotonic()
        losses = held_out.losses(self.eval, self.state.params, self.functions.batch, self.eval_sets)
        self.ready = time.monotonic()
        found = Evaluated(step, losses, self.ready - started)
        self.evals.append(found)
        return found

    def poison(self) -> None:
        """A rehearsal of a bad state: the first parameter is not a number any more."""
        assert self.state is not None
        leaves, tree = jax.tree.flatten(self.state.params)
        params = jax.tree.unflatten(tree, [leaves[0] * float("nan"), *leaves[1:]])
        self.state = self.state._replace(params=params)

    def save(self, step: int) -> SaveBegun:
        """Has a copy of the state saved in the background. `trouble` says what becomes of it."""
        assert self.state is not None
        if self.halted or self.rows and not self.rows[-1].metrics["ok"]:
            return SaveBegun(0.0, f"step {step} comes after a bad one: its state may be bad as well")
        started = time.monotonic()
        copy = self.of_state("copy") if self.beside else lambda state: state
        sums_of, state = self.of_state("sums"), self.state
        # Blocks: two programs with collectives, run at the same time, can deadlock.
        job = saving.begin(self.saver, step, lambda: (copy(state), jax.block_until_ready(sums_of(state))))
        if not self.beside:
            job.off.wait(VOTE_S)
        self.ready = time.monotonic()
        return SaveBegun(self.ready - started, None)

    def trouble(self) -> SaveFailed | None:
        """The save that was found to have failed since the last call, if any."""
        return saving.poll(self.saver)

    def wait(self, wait_s: float = math.inf) -> bool:
        """Returns once nothing is being written any more; False where something still is after wait_s."""
        if self.tracing:  # stopped amid the steps to be traced
            jax.profiler.stop_trace()
            self.tracing = False
        return saving.settle(self.saver, wait_s)
