"""One host's part of serving, behind the verbs the controller speaks: restore, step, last."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma.batching.plans import Answer, Limits, Plan, pages_for
from gemma.config import Mesh, Model, Program, Serve
from gemma.engine import engine as engines
from gemma.engine.engine import Engine
from gemma.engine.forward import NORMS, Shape
from gemma.messages import Opened, Restored
from gemma.model import load
from gemma.model.sharding import make_mesh, sharding
from gemma.model.transformer import Gemma
from gemma.plan import flops, v5p
from gemma.weights.sources import open_source

Tree = Any
CPU_CACHE_BYTES = 1 << 30
JUDGE_SLOTS, JUDGE_CONTEXT = 8, 4096
PAGES = {False: 32, True: 128}  # positions of a page; on TPU the kernel asks for pages one by one, so they are larger


UnderWay = tuple[float, list[tuple[Engine, engines.Underway]]]  # time.monotonic() at which it was sent


class Server:
    """Holds a host's share of weights and cache between verbs."""

    def __init__(self, program: Program, folder: Path, cache: Path, texts: Any = None):
        """Compiles or loads every program."""
        assert program.serve is not None
        self.serve, self.model, self.cache = program.serve, program.model, cache
        started = time.monotonic()
        self.by_host = program.evaluate is not None  # an evaluation's hosts write by themselves, and all are heard
        devices = jax.local_devices() if self.by_host else jax.devices()
        self.mesh = make_mesh(program.mesh, devices[: math.prod(program.mesh.shape)])
        platform = self.mesh.devices.flat[0].platform
        dtypes = dtypes_of(program.serve, platform)
        judge = judge_of(program.serve)
        judged = judge_limits(program.serve, judge, dtypes, platform, program.mesh) if judge else None
        beside = held_bytes(judge, judged, dtypes, program.mesh) if judge and judged else 0
        served = limits_of(program.serve, program.model, dtypes, platform, program.mesh, beside)
        models = [(program.model, served), *([(judge, judged)] if judge and judged else [])]
        self.abstract = [abstract_params(model, self.mesh, dtypes.loaded) for model, _ in models]
        prepared = [
            engines.prepare(Shape(model, dtypes.computed, self.mesh, dtypes.int8), abstract, limits, cache)
            for (model, limits), abstract in zip(models, self.abstract, strict=True)
        ]
        self.engines = [engine for engine, _ in prepared]  # of the model served, and of its judge
        self.cached = all(there for _, there in prepared)
        self.under_way: UnderWay | None = None
        self.done_at = 0.0
        self.seconds = {"compile": time.monotonic() - started}

    def opened(self) -> Opened:
        return Opened(share_key="", share_bytes=0)

    def restore(self, step: int | None) -> Restored:
        """Loads the weights, in place of those that were there; all caches are empty then. step: of the run that is
        served, None where the weights have none. Raises WeightsError.
        """
        started, self.under_way = time.monotonic(), None
        sources = [(self.serve.checkpoint, step), (self.serve.filter_weights, None)]
        for engine, abstract, (path, at) in zip(self.engines, self.abstract, sources, strict=False):
            assert path is not None
            engine.weights = engine.state = None  # there may be no room for two
            engines.load(engine, load.load_params(path, abstract, at))
        self.seconds["restore"] = time.monotonic() - started
        return Restored(
            step=0,
            fresh=False,
            fingerprint="",
            bytes_per_target=1.0,
            step_flops=0,
            compile_cached=self.cached,
            platform=jax.devices()[0].platform,
            seconds=dict(self.seconds),
            steps=0,
            eval_fingerprints={},
            warnings=(),
            limits=tuple(engine.limits for engine in self.engines),
        )

    def step(self, *plans: Plan) -> tuple[Answer, ...] | None:
        """A plan for each model, in the order of `Restored.limits`. It is sent to the devices, and what is answered is
        the plan before it: the devices are never without work while answers travel. None where there was none.
        """
        sent = [(engine, engines.send(engine, plan)) for engine, plan in zip(self.engines, plans, strict=True)]
        before, self.under_way = self.under_way, (time.monotonic(), sent)
        return self.received(before)

    def last(self) -> tuple[Answer, ...] | None:
        """What the newest plan's answer is."""
        before, self.under_way = self.under_way, None
        return self.received(before)

    def received(self, under_way: UnderWay | None) -> tuple[Answer, ...] | None:
        """Its seconds: since it was sent, or since the devices were done with the one before."""
        if under_way is None:
            return None
        sent_at, sent = under_way
        answers = [engines.receive(engine, one) for engine, one in sent]
        begun, self.done_at = max(sent_at, self.done_at), time.monotonic()
        return tuple(replace(answer, seconds=self.done_at - begun) for answer in answers)

    def trouble(self) -> None:
        """Nothing is saved, so no save fails."""


@dataclass(frozen=True)
class Dtypes:
    loaded: str
    computed: str  # of the cache too
    int8: bool  # weights are held in eight bits

    @property
    def weight_bytes(self) -> int:
        return 1 if self.int8 else jnp.dtype(self.loaded).itemsize

    @property
    def cache_bytes(self) -> int:
        return jnp.dtype(self.computed).itemsize


def dtypes_of(serve: Serve, platform: str) -> Dtypes:
    usual = "bfloat16" if platform == "tpu" else "float32"
    loaded = usual if serve.weights in ("auto", "int8") else serve.weights
    return Dtypes(loaded, loaded if platform == "tpu" else "float32", serve.weights == "int8")


def abstract_params(model: Model, mesh: jax.sharding.Mesh, dtype: str) -> Tree:
    """The parameters' shapes, in the dtype that they are served in, and their places."""
    state = nnx.state(nnx.eval_shape(lambda: Gemma(model, rngs=nnx.Rngs(0))))

    def place(path: Any, leaf: nnx.Param) -> jax.ShapeDtypeStruct:
        kept = any(str(getattr(key, "key", key)) in NORMS for key in path)
        return jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype("float32" if kept else dtype), sharding=sharding(mesh, leaf.axes)
        )

    placed = jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(placed)


def judge_of(serve: Serve) -> Model | None:
    """The model that serve.filter asks. Raises WeightsError."""
    return open_source(Path(serve.filter_weights).expanduser()).model if serve.filter_weights else None


def judge_limits(serve: Serve, model: Model, dtypes: Dtypes, platform: str, mesh: Mesh) -> Limits:
    """Of a judge: it decides by two scores, and chooses no tokens."""
    context = min(model.context, JUDGE_CONTEXT)
    of_judge = replace(serve, slots=JUDGE_SLOTS, context=context, cache_tokens=JUDGE_SLOTS // 2 * context)
    return replace(limits_of(of_judge, model, dtypes, platform, mesh, 0), scores=True)


def held_bytes(model: Model, limits: Limits, dtypes: Dtypes, mesh: Mesh) -> int:
    """Weights and cache of a model on a chip."""
    weights = sum(flops.parameters(model)) * dtypes.weight_bytes // (mesh.tensor * mesh.fsdp)
    pages = (limits.local_pages + limits.global_pages) * (model.layers // 2) * limits.page
    return weights + pages * 2 * model.kv_heads * model.head_size * dtypes.cache_bytes // mesh.tensor


def limits_of(serve: Serve, model: Model, dtypes: Dtypes, platform: str, mesh: Mesh, beside_bytes: int = 0) -> Limits:
    """The compiled shapes, and how many pages fit beside the weights and what else is there. Pure: all hosts find the
    same.
    """
    page = serve.page or PAGES[platform == "tpu"]
    context = min(serve.context or model.context, model.context)
    context = pages_for(context, page) * page
    chunk = min(serve.chunk, context)
    local_tokens = min(context, model.window + chunk + 2 * page)  # of a sequence
    token_bytes = 2 * (model.layers // 2) * model.kv_heads * model.head_size * dtypes.cache_bytes // mesh.tensor
    local_pages = serve.slots * pages_for(local_tokens, page) + 1
    wanted = serve.cache_tokens or serve.slots * context
    if serve.cache_tokens is None:
        weights = sum(flops.parameters(model)) * dtypes.weight_bytes // (mesh.tensor * mesh.fsdp)
        room = v5p.HBM_BYTES * v5p.FREE_SHARE - weights - beside_bytes if platform == "tpu" else CPU_CACHE_BYTES
        positions = int(room // token_bytes)  # of a local and of a global layer together
        wanted = min(wanted, max(positions - local_pages * page, positions // 2))
    global_pages = max(pages_for(wanted, page), pages_for(context, page)) + 1
    sizes = (8, 64) if platform == "tpu" else (1, 8, 64)  # fewer than 8 rows are no faster on TPU
    rows = sorted({size for size in sizes if size < serve.slots} | {serve.slots})
    chunks = sorted({max(1, chunk // 16), max(1, chunk // 4), chunk})
    return Limits(
        serve.slots,
        context,
        page,
        model.window,
        global_pages,
        min(local_pages, global_pages),
        tuple(rows),
        tuple(chunks),
        scores=False,
    )
