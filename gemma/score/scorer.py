"""One host's part of scoring requests, behind the verbs the controller speaks: restore, score."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gemma.config import Program
from gemma.engine import engine as engines
from gemma.engine.forward import Shape, unstacked, weight_places
from gemma.engine.server import abstract_params
from gemma.messages import Opened, Restored, Scores
from gemma.model import load
from gemma.model.sharding import make_mesh
from gemma.score.blocks import Blocks
from gemma.train import aot


class Scorer:
    """Holds a host's share of the weights between verbs."""

    def __init__(self, program: Program, folder: Path, cache: Path, texts: Any = None):
        """Compiles or loads every program. folder: the run directory, with the requests in it."""
        assert program.evaluate is not None
        self.what, started = program.evaluate, time.monotonic()
        devices = jax.devices()[: math.prod(program.mesh.shape)]
        self.mesh = make_mesh(program.mesh, devices)
        dtype = program.train.dtype
        shape = Shape(program.model, dtype, self.mesh)
        self.abstract = abstract_params(program.model, self.mesh, dtype)
        unstack = jax.jit(lambda params: unstacked(params, shape), out_shardings=weight_places(shape))
        weights = engines.placed(jax.eval_shape(unstack, self.abstract), weight_places(shape))
        self.blocks = Blocks(folder, shape, weights, lambda held: held, cache)
        some = devices if len(devices) < jax.device_count() else None
        facts = (program.model, dtype, tuple(self.mesh.shape.items()))
        self.unstack, there = aot.compiled("requests-unstack", unstack, (self.abstract,), facts, cache, some)
        self.cached, self.weights = there and self.blocks.cached, None
        self.seconds = {"compile": time.monotonic() - started}

    def opened(self) -> Opened:
        return Opened(share_key="", share_bytes=0)

    def restore(self, step: int, digest: str) -> Restored:
        """Stands ready with `step` answers there, the weights on the devices. digest: of the requests that are meant.
        Raises ConfigError, WeightsError.
        """
        started = time.monotonic()
        self.blocks.check(digest)
        if self.weights is None:
            params = load.load_params(self.what.weights, self.abstract, self.what.step)
            self.weights = jax.block_until_ready(self.unstack(params))
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
            steps=self.blocks.plan.blocks,
            eval_fingerprints={},
            warnings=(),
        )

    def score(self, steps: Sequence[tuple[int, ...]]) -> tuple[Scores, ...]:
        """steps: the blocks that are computed together, one a device; -1 is none."""
        return self.blocks.score(self.weights, steps)

    def trouble(self) -> None:
        """Nothing is saved, so no save fails."""
