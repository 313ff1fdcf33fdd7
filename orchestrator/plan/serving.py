"""What a server needs and how fast it can be, told before a slice is paid for: pure, from the compiler's facts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemma.batching.plans import pages_for
from gemma.config import ConfigError, Mesh, Model, check
from gemma.plan import flops, v5p
from orchestrator.config import Config
from orchestrator.plan import ahead

BYTES = {"auto": 2, "bfloat16": 2, "float32": 4, "int8": 2}  # of a number in the cache, on TPU


@dataclass(frozen=True)
class Decode:
    """One decode step of so many rows, each with `length` positions before it. Seconds.

    ideal: a chip's weights and the rows' keys and values, read once at full bandwidth. hbm: all that the program reads
    and writes, at full bandwidth. network: sums over `tensor`, bytes over the links. estimate: XLA's part by the rule
    of the compiler's cost model (`Cost.overlapped_s`), the kernel's by its bytes at full bandwidth, and the network,
    one after the other. cycles: the same with the cycles that the code generator expects of each fusion.
    """

    rows: int
    ideal: float
    hbm: float
    network: float
    estimate: float
    cycles: float
    tokens_per_s: float  # of the replica, at the estimate

    @property
    def over_ideal(self) -> float:
        return self.estimate / self.ideal


@dataclass(frozen=True)
class ServingPlan:
    fits: bool
    message: str
    needed_bytes: int  # of a chip, by the largest program
    hbm_limit_bytes: int
    weights_bytes: int
    cache_bytes: int
    cache_tokens: int  # positions of global layers' pages: prompts and answers of all sequences
    sequences: int  # of `length` positions, that the cache holds
    length: int
    decode: list[Decode]
    chunk: int  # tokens of a prompt that are computed at a time
    chunk_s: float | None  # the last chunk of a prompt of `length`
    first_token_s: float | None  # after a prompt of `length`, on a replica with nothing else to do
    prompt_tokens_per_s: float | None
    mesh: dict[str, int]
    slice: str
    topology: str
    chips: int
    overrides: list[str]
    compile_s: float
    cached: bool


def make(config: Config, facts: dict[str, Any], overrides: list[str], cached: bool) -> ServingPlan:
    """facts: `gemma.plan.serving_ahead.ServingFacts` as JSON gives them."""
    program, serve = config.program, config.serve
    assert serve is not None
    steps = [*facts["decode"], *facts["choice"], *facts["prefill"]]
    needed = max(step["needed_bytes"] for step in steps)
    fits = not facts["message"] and needed <= v5p.HBM_BYTES
    length = min(config.plan.length, serve.context or config.model.context, config.model.context)
    chunk = facts["prefill"][0]["size"]
    starts = range(0, length, chunk)
    chunk_s = [prefill_s(config, facts, start, min(length, start + chunk)) for start in starts] if fits else []
    last = facts["choice"][0]["cost"]
    first = sum(chunk_s) + (last["overlapped_s"] + last["network_s"] if fits else 0.0)
    return ServingPlan(
        fits=fits,
        message=facts["message"],
        needed_bytes=needed,
        hbm_limit_bytes=int(v5p.HBM_BYTES),
        weights_bytes=facts["weights_bytes"],
        cache_bytes=facts["cache_bytes"],
        cache_tokens=facts["cache_tokens"],
        sequences=facts["cache_tokens"] // (pages_for(length, facts["page"]) * facts["page"]),
        length=length,
        decode=[decode(config, facts, at, length) for at in range(len(facts["decode"]))] if fits else [],
        chunk=chunk,
        chunk_s=chunk_s[-1] if fits else None,
        first_token_s=first if fits else None,
        prompt_tokens_per_s=length / first if fits else None,
        mesh=dict(zip(("replica", "fsdp", "tensor"), program.mesh.shape, strict=True)),
        slice=config.cluster.slice,
        topology=config.slice.topology,
        chips=config.chips,
        overrides=overrides,
        compile_s=facts["compile_s"],
        cached=cached,
    )


def decode(config: Config, facts: dict[str, Any], at: int, length: int) -> Decode:
    step, choice = facts["decode"][at], facts["choice"][at]
    costs, rows = (step["cost"], choice["cost"]), step["size"]

    def of(name: str) -> float:
        return float(sum(cost[name] for cost in costs))

    read_s = rows * read_bytes(config, length, facts["page"]) / v5p.HBM_BYTES_PER_S
    exact_s = rows * read_bytes(config, length, 1) / v5p.HBM_BYTES_PER_S
    estimate = of("overlapped_s") + read_s + of("network_s")
    return Decode(
        rows=rows,
        ideal=facts["weights_bytes"] / v5p.HBM_BYTES_PER_S + exact_s,
        hbm=of("hbm_bytes") / v5p.HBM_BYTES_PER_S + read_s,
        network=of("network_s"),
        estimate=estimate,
        cycles=of("cycles_s") + read_s + of("network_s"),
        tokens_per_s=rows / estimate,
    )


def read_bytes(config: Config, length: int, page: int) -> float:
    """Keys and values that one row's attention reads on a chip: whole pages, of local layers those of the window."""
    model, serve, tensor = config.model, config.serve, config.program.mesh.tensor
    assert serve is not None
    position = 2 * model.kv_heads * model.head_size * BYTES[serve.weights] / tensor
    seen = [pages_for(min(length, model.window), page) * page, pages_for(length, page) * page]
    return float(model.layers // 2 * sum(seen) * position)


def prefill_s(config: Config, facts: dict[str, Any], start: int, stop: int) -> float:
    """The chunk from start on, up to stop: XLA's part as it was compiled, and attention to all before it."""
    cost = facts["prefill"][0]["cost"]
    products = attention_flops(config.model, start, stop) / config.program.mesh.tensor / v5p.FLOPS
    read_s = read_bytes(config, stop, facts["page"]) / v5p.HBM_BYTES_PER_S
    return float(cost["overlapped_s"] + cost["network_s"] + max(products, read_s))


def attention_flops(model: Model, start: int, stop: int) -> float:
    """Of the queries from start to stop: each sees all before it, in local layers those of the window."""
    pairs = sum(flops.keys_seen(stop, window) - flops.keys_seen(start, window) for window in (model.window, None))
    return 4.0 * model.layers // 2 * pairs * model.heads * model.head_size


def best(config: Config, overridden: set[str], plain: list[str], tell: ahead.Tell) -> list[ServingPlan]:
    """Every mesh of the slice that goes with the model, compiled; those that fit first, by tokens/s of a full step."""
    found = []
    for candidate in meshes(config, overridden):
        answer = ahead.facts_of(candidate, tell)
        found.append(make(candidate, answer.facts, overrides(candidate.mesh, plain), answer.cached))
    if not found:
        raise ConfigError(f"plan.search: no mesh of {config.cluster.slice} goes with model={config.model.name}")
    return ranked(found)


def ranked(found: Sequence[ServingPlan]) -> list[ServingPlan]:
    return sorted(found, key=lambda p: (not p.fits, -p.decode[-1].tokens_per_s if p.decode else math.inf))


def meshes(config: Config, overridden: set[str]) -> Iterator[Config]:
    """Heads cut over as many chips as possible first."""
    chips = config.chips
    for tensor in (n for n in range(chips, 0, -1) if chips % n == 0):
        mesh = Mesh(1, chips // tensor, tensor)
        given = [key for key in AXES if f"mesh.{key}" in overridden]
        if any(getattr(config.mesh, key) not in (-1, getattr(mesh, key)) for key in given):
            continue
        found = replace(config, mesh=mesh)
        try:
            check(found.program)
        except ConfigError:
            continue
        yield found


AXES = ("replica", "fsdp", "tensor")


def overrides(mesh: Mesh, plain: list[str]) -> list[str]:
    rest = [o for o in plain if not o.startswith("mesh.")]
    return [*rest, *(f"mesh.{axis}={getattr(mesh, axis)}" for axis in AXES)]
