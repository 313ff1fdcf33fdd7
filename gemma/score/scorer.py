"""One host's part of scoring requests, behind the verbs the controller speaks: restore, score."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma.batching.rows import FILE, PREFIX_WIDTHS, Plan, at_least
from gemma.batching.rows import load as load_plan
from gemma.config import ConfigError, Program
from gemma.engine import engine as engines
from gemma.engine.forward import Shape, unstacked, weight_places
from gemma.engine.server import abstract_params
from gemma.messages import Opened, Restored, Scores
from gemma.model import load
from gemma.model.sharding import make_mesh
from gemma.score import program as programs
from gemma.score.program import Block
from gemma.train import aot

NO_PREFIX = -1


class Scorer:
    """Holds a host's share of the weights between verbs, and the keys and values of one prefix."""

    def __init__(self, program: Program, folder: Path, cache: Path, texts: Any = None):
        """Compiles or loads every program. folder: the run directory, with the requests in it."""
        assert program.evaluate is not None
        self.what, started = program.evaluate, time.monotonic()
        self.plan = load_plan(folder / FILE)
        devices = jax.devices()[: int(np.prod(program.mesh.shape))]
        self.mesh = make_mesh(program.mesh, devices)
        dtype = program.train.dtype
        self.shape = Shape(program.model, dtype, self.mesh)
        self.abstract = abstract_params(program.model, self.mesh, dtype)
        weights = engines.placed(
            jax.eval_shape(lambda params: unstacked(params, self.shape), self.abstract), weight_places(self.shape)
        )
        some = list(self.mesh.devices.flat) if len(devices) < jax.device_count() else None
        facts = (program.model, dtype, tuple(self.mesh.shape.items()))
        sizes = sorted({self.sizes(block) for block in range(self.plan.blocks)})
        wanted = programs.programs(self.shape, weights, sizes)
        jitted = jax.jit(lambda params: unstacked(params, self.shape), out_shardings=weight_places(self.shape))
        wanted["unstack",] = jitted, (self.abstract,)
        self.programs: dict[Any, Any] = {}

        def compiled(name: Any) -> bool:
            jitted, arguments = wanted[name]
            told = "-".join(("requests", *map(str, name)))
            self.programs[name], there = aot.compiled(told, jitted, arguments, facts, cache, some)
            return there

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.cached = all(list(pool.map(compiled, wanted)))  # every one, also after one that was not there
        self.weights: Any = None
        self.prefix: tuple[int, Any] = (NO_PREFIX, ())
        self.seconds = {"compile": time.monotonic() - started}

    def sizes(self, block: int) -> tuple[int, int, int, int]:
        prefix, width, rows, targets = (int(n) for n in self.plan.shapes[block])
        return self.prefix_width(prefix), width, rows, targets

    def prefix_width(self, prefix: int) -> int:
        at = self.plan.prefix_at
        return 0 if prefix < 0 else at_least(PREFIX_WIDTHS, int(at[prefix + 1] - at[prefix]))

    def opened(self) -> Opened:
        return Opened(share_key="", share_bytes=0)

    def restore(self, step: int, digest: str) -> Restored:
        """Stands ready with `step` answers there, the weights on the devices. digest: of the requests that are meant.
        Raises ConfigError, WeightsError.
        """
        started = time.monotonic()
        if (found := self.plan.digest()) != digest:
            raise ConfigError(f"run.root: a host reads other requests there ({found}, not {digest})")
        if self.weights is None:
            params = load.load_params(self.what.weights, self.abstract, self.what.step)
            self.weights = jax.block_until_ready(self.programs["unstack",](params))
        self.seconds["restore"] = time.monotonic() - started
        return Restored(
            step=step,
            fresh=step == 0,
            fingerprint="",
            bytes_per_target=1.0,
            step_flops=0,
            compile_cached=self.cached,
            platform=jax.devices()[0].platform,
            seconds=dict(self.seconds),
            steps=self.plan.blocks,
            eval_fingerprints={},
            warnings=(),
        )

    def score(self, steps: Sequence[tuple[int, ...]]) -> tuple[Scores, ...]:
        """steps: the blocks that are computed together, one a device; -1 is none. One step is sent before the one
        before it is waited for.
        """
        found: list[Scores] = []
        flight: list[tuple[tuple[int, ...], Any]] = []
        for blocks in steps:
            flight.append((blocks, self.send(blocks)))
            if len(flight) > 1:
                found += self.received(*flight.pop(0))
        for one in flight:
            found += self.received(*one)
        return tuple(found)

    def send(self, blocks: tuple[int, ...]) -> Any:
        first = next(block for block in blocks if block >= 0)
        length, width, rows, targets = self.sizes(first)
        prefix = int(self.plan.shapes[first][0])
        if self.prefix[0] != prefix and prefix >= 0:
            tokens = self.plan.prefix[self.plan.prefix_at[prefix] : self.plan.prefix_at[prefix + 1]]
            tokens_P = np.zeros(length, np.int32)
            tokens_P[: len(tokens)] = tokens
            self.prefix = NO_PREFIX, ()  # there may be no room for two
            self.prefix = prefix, self.programs["prefix", length](self.weights, tokens_P, np.int32(len(tokens)))
        known = int(self.plan.prefix_at[prefix + 1] - self.plan.prefix_at[prefix]) if prefix >= 0 else 0
        arrays = block_arrays(self.plan, blocks, width, rows, targets)
        placed = Block(*map(self.place, arrays, programs.block_places(self.mesh)))
        before = self.prefix[1] if prefix >= 0 else ()
        return self.programs["score", length, width, rows, targets](self.weights, placed, before, np.int32(known))

    @staticmethod
    def place(array: np.ndarray, where: Any) -> jax.Array:
        """Each host gives its own devices' part."""
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    def received(self, blocks: tuple[int, ...], found: Any) -> list[Scores]:
        """Waits for a step. A request's log-probability is the sum of its targets', in order, in float64."""
        logprob_XC, greedy_XC = jax.device_get(found)
        told = []
        for slot, block in enumerate(blocks):
            if block < 0:
                continue
            scores, first = [], 0
            for request in self.plan.requests_of(block):
                last = first + int(self.plan.counts[request])
                parts = logprob_XC[slot, first:last].tolist()
                scores.append((sum(parts), bool(greedy_XC[slot, first:last].all())))
                first = last
            told.append(Scores(block, tuple(scores)))
        return told

    def trouble(self) -> None:
        """Nothing is saved, so no save fails."""


def block_arrays(plan: Plan, blocks: Sequence[int], width: int, rows: int, targets: int) -> Block:
    """Of all devices, one block each."""
    R = rows * len(blocks)
    tokens_RT, branch_RT = np.zeros((R, width), np.int32), np.zeros((R, width), np.int32)
    position_RT = np.full((R, width), -1, np.int32)
    place_XC, target_XC = (np.zeros((len(blocks), targets), np.int32) for _ in range(2))
    for slot, block in enumerate(blocks):
        if block < 0:
            continue
        first = 0
        for n, row in enumerate(plan.rows[plan.rows_at[block] : plan.rows_at[block + 1]]):
            at, part = slot * rows + n, slice(*plan.row_at[row : row + 2])
            length = part.stop - part.start
            tokens_RT[at, :length] = plan.tokens[part]
            position_RT[at, :length] = plan.position[part]
            branch_RT[at, :length] = plan.branch[part]
            part = slice(*plan.target_at[row : row + 2])
            last = first + int(part.stop - part.start)
            place_XC[slot, first:last] = plan.place[part] + n * width
            target_XC[slot, first:last] = plan.target[part]
            first = last
    return Block(tokens_RT, position_RT, branch_RT, place_XC, target_XC)
