"""Blocks of rows on a host's devices: compiled ahead, sent one before the one before it is waited for.

R rows of all devices, T tokens of a row, X devices that have rows, C targets of a device, P tokens of the prefix.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma.batching.rows import FILE, PREFIX_WIDTHS, Plan, at_least
from gemma.batching.rows import load as load_plan
from gemma.config import ConfigError
from gemma.engine.forward import Shape
from gemma.messages import Scores
from gemma.score import program as programs
from gemma.score.program import Block, Of
from gemma.train import aot

Tree = Any
NO_PREFIX = -1


class Blocks:
    """The requests of a run directory, and the keys and values of one prefix."""

    def __init__(self, folder: Path, shape: Shape, weights: Tree, of: Of, cache: Path):
        """Compiles or loads every program. weights: jax.ShapeDtypeStruct, as `score` will be given them; of: as in
        `gemma.score.program.programs`.
        """
        self.plan, self.mesh = load_plan(folder / FILE), shape.mesh
        self.digest = self.plan.digest()
        devices = list(self.mesh.devices.flat)
        some = devices if len(devices) < jax.device_count() else None
        held = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(weights))
        facts = (shape.model, shape.dtype, held, tuple(self.mesh.shape.items()))
        sizes = sorted({self.sizes(block) for block in range(self.plan.blocks)})
        wanted = programs.programs(shape, weights, of, sizes)
        self.programs: dict[Any, Any] = {}

        def compiled(name: Any) -> bool:
            jitted, arguments = wanted[name]
            told = "-".join(("requests", *map(str, name)))
            self.programs[name], there = aot.compiled(told, jitted, arguments, facts, cache, some)
            return there

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.cached = all(list(pool.map(compiled, wanted)))  # every one, also after one that was not there
        self.prefix: tuple[int, Any] = (NO_PREFIX, ())

    def drop_prefix(self) -> None:
        """Frees its keys and values."""
        self.prefix = NO_PREFIX, ()

    def check(self, digest: str) -> None:
        """Raises ConfigError where other requests are meant than those that lie here."""
        if digest != self.digest:
            raise ConfigError(f"run.root: a host reads other requests there ({self.digest}, not {digest})")

    def sizes(self, block: int) -> tuple[int, int, int, int]:
        prefix, width, rows, targets = (int(n) for n in self.plan.shapes[block])
        return self.prefix_width(prefix), width, rows, targets

    def prefix_width(self, prefix: int) -> int:
        at = self.plan.prefix_at
        return 0 if prefix < 0 else at_least(PREFIX_WIDTHS, int(at[prefix + 1] - at[prefix]))

    def score(self, weights: Tree, steps: Sequence[tuple[int, ...]]) -> tuple[Scores, ...]:
        """steps: the blocks that are computed together, one a device; -1 is none. One step is sent before the one
        before it is waited for.
        """
        found: list[Scores] = []
        self.prefix = NO_PREFIX, ()  # of other weights, maybe
        flight: list[tuple[tuple[int, ...], Any]] = []
        for blocks in steps:
            flight.append((blocks, self.send(weights, blocks)))
            if len(flight) > 1:
                found += self.received(*flight.pop(0))
        for one in flight:
            found += self.received(*one)
        return tuple(found)

    def send(self, weights: Tree, blocks: tuple[int, ...]) -> Any:
        first = next(block for block in blocks if block >= 0)
        length, width, rows, targets = self.sizes(first)
        prefix = int(self.plan.shapes[first][0])
        if self.prefix[0] != prefix and prefix >= 0:
            tokens = self.plan.prefix[self.plan.prefix_at[prefix] : self.plan.prefix_at[prefix + 1]]
            tokens_P = np.zeros(length, np.int32)
            tokens_P[: len(tokens)] = tokens
            self.prefix = NO_PREFIX, ()  # there may be no room for two
            self.prefix = prefix, self.programs["prefix", length](weights, tokens_P, np.int32(len(tokens)))
        known = int(self.plan.prefix_at[prefix + 1] - self.plan.prefix_at[prefix]) if prefix >= 0 else 0
        arrays = block_arrays(self.plan, blocks, width, rows, targets)
        placed = Block(*map(self.place, arrays, programs.block_places(self.mesh)))
        before = self.prefix[1] if prefix >= 0 else ()
        return self.programs["score", length, width, rows, targets](weights, placed, before, np.int32(known))

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
