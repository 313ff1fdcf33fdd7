"""A replica's part of generating and scoring: it holds weights and cache, and does what plans say.

Every program is compiled, or read from disk, before the first plan; none is compiled while plans are done. Tokens stay
on the devices from step to step: a plan can be sent before the answer of the one before it is there.

R rows, T tokens of a chunk, B slots, V vocabulary, J pages of a row.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma.batching.plans import MOST_LOGPROBS, Admit, Answer, Chosen, Chunk, Limits, Plan, Row, Scored, Table
from gemma.engine import sampling
from gemma.engine.forward import (
    FEWEST_ROWS,
    Cache,
    Rows,
    Shape,
    all_logits,
    hidden_over_pages,
    pages_of,
    unstacked,
    weight_places,
)
from gemma.model.transformer import float32_means_float32
from gemma.train import aot

Tree = Any
VOCABULARY = (None, "tensor")  # how logits_RV lie
SCORED = 64  # positions of a chunk whose logits are there at a time


class State(NamedTuple):
    """What lives on the devices besides the weights; each program gets it and gives it back."""

    cache: Cache
    token_B: jax.Array  # the newest of each slot
    counts_BV: jax.Array  # int16: how often a slot has chosen each token
    seen_BV: jax.Array  # bool: what its prompt has
    numbers: sampling.Numbers


class Picked(NamedTuple):
    """Of each row: the token chosen, its log-probability, and the most likely tokens with theirs."""

    token_R: jax.Array
    logprob_R: jax.Array
    top_RL: jax.Array
    top_logprob_RL: jax.Array


@dataclass
class Engine:
    limits: Limits
    shape: Shape
    weights: Tree
    state: Any  # State; None before there are weights
    programs: dict[tuple[Any, ...], Any]
    with_logprobs: set[int]  # slots that ask for log-probabilities


def open_engine(shape: Shape, params: Tree, limits: Limits, cache: Path) -> Engine:
    """params: as `gemma.model.load.load_params` gives them, placed on the mesh."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    engine, _ = prepare(shape, abstract, limits, cache)
    load(engine, params)
    return engine


def load(engine: Engine, params: Tree) -> None:
    """Gives the engine its weights, and an empty cache."""
    engine.weights = engine.programs["unstack", 1](params)
    engine.state = engine.programs["fresh", 1]()
    engine.with_logprobs.clear()


def fresh(shape: Shape, limits: Limits) -> State:
    model, dtype = shape.model, jnp.dtype(shape.dtype)
    pages = [limits.local_pages if layer % 2 == 0 else limits.global_pages for layer in range(model.layers)]
    layout, tensor = pages_of(shape), shape.mesh.shape["tensor"]
    cache = tuple(layout.empty(model, count, limits.page, dtype, tensor) for count in pages)
    B, V = limits.slots, model.vocab
    numbers = jax.tree.map(jnp.asarray, sampling.no_numbers(B))
    return State(
        cache,
        jnp.zeros(B, jnp.int32),
        jnp.zeros((B, V), jnp.int16),
        jnp.zeros((B, V), bool),
        numbers,
    )


def places(shape: Shape) -> Tree:
    """Pages are cut over `tensor` by their heads, counts along the vocabulary; all else is everywhere."""
    axes = (), pages_of(shape).AXES, VOCABULARY
    everywhere, heads, vocabulary = (NamedSharding(shape.mesh, PartitionSpec(*of)) for of in axes)
    tensor = shape.mesh.shape["tensor"]
    layer = partial(pages_of(shape).empty, shape.model, 1, 1, jnp.dtype(shape.dtype), tensor)
    a_layer = jax.eval_shape(layer)
    of = ((heads,) * len(a_layer),) * shape.model.layers
    numbers: Tree = sampling.Numbers(*[everywhere] * len(sampling.Numbers._fields))  # type: ignore[arg-type]
    found: Tree = State(of, everywhere, vocabulary, vocabulary, numbers)  # type: ignore[arg-type]
    return found


class Program(NamedTuple):
    """What is compiled ahead: a function, the shapes and places of what it takes, and the places of what it gives."""

    function: Any
    arguments: tuple[Any, ...]
    places: Any
    donated: tuple[int, ...]

    @property
    def jitted(self) -> Any:
        return jax.jit(self.function, donate_argnums=self.donated, out_shardings=self.places)


def prepare(shape: Shape, params: Tree, limits: Limits, cache: Path) -> tuple[Engine, bool]:
    """Compiles every program, or reads it from disk; whether all were there. params: jax.ShapeDtypeStruct, placed."""
    engine = Engine(limits, shape, None, None, {}, set())
    wanted = programs(shape, params, limits)
    held = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(params))
    devices = list(shape.mesh.devices.flat)
    some = devices if len(devices) < jax.device_count() else None
    facts = (shape.model, shape.dtype, shape.int8, held, limits, tuple(shape.mesh.shape.items()))

    def compiled(name: tuple[Any, ...]) -> bool:
        program = wanted[name]
        engine.programs[name], there = aot.compiled(
            "-".join(map(str, name)), program.jitted, program.arguments, facts, cache, some
        )
        return there

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return engine, all(list(pool.map(compiled, wanted)))  # every one, also after one that was not there


def programs(shape: Shape, params: Tree, limits: Limits) -> dict[tuple[Any, ...], Program]:
    """All that an engine runs, by name and sizes."""
    mesh, V = shape.mesh, shape.model.vocab
    everywhere, vocabulary = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), VOCABULARY))
    state, layout = places(shape), weight_places(shape)
    weights = placed(jax.eval_shape(partial(unstacked, shape=shape), params), layout)
    abstract = placed(jax.eval_shape(partial(fresh, shape, limits)), state)
    one = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=everywhere)
    found: dict[tuple[Any, ...], Program] = {}
    for R in limits.rows:
        given = weights, abstract, *row_shapes(limits, R, 1, one)
        found["decode", R] = Program(partial(decode, shape), given, (state, vocabulary), (1,))
    for T in limits.chunks:
        given = weights, abstract, *row_shapes(limits, 1, T, one)[1:], one((1, T)), one((1,))
        found["prefill", T] = Program(partial(prefill, shape, False), given, (state, vocabulary, None), (1,))
        if limits.scores:
            scores = (state, vocabulary, everywhere)
            found["score", T] = Program(partial(prefill, shape, True), (*given, one((1, T))), scores, (1,))
    for R in sorted({1, *limits.rows}):
        logits_RV = jax.ShapeDtypeStruct((R, V), jnp.float32, sharding=vocabulary)
        for logprobs in (False, True):
            given = abstract, one((R,)), one((R,)), logits_RV
            found["pick", R, logprobs] = Program(partial(pick, logprobs), given, (state, everywhere), (0,))
    admitted = abstract, np.int32(0), sampling.no_numbers(1), np.zeros(V, np.int16), np.zeros(V, bool)
    return found | {
        ("unstack", 1): Program(partial(unstacked, shape=shape), (params,), layout, ()),
        ("fresh", 1): Program(partial(fresh, shape, limits), (), state, ()),
        ("admit", 1): Program(admit, admitted, state, (0,)),
    }


def placed(tree: Tree, at: Tree) -> Tree:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, at)


def row_shapes(limits: Limits, R: int, T: int, one: Any) -> tuple[Any, ...]:
    return one((R,)), Rows(one((R, T)), one((R, limits.local_pages_seen(T))), one((R,)), one((R, limits.pages_seen)))


def decode(shape: Shape, weights: Tree, state: State, slot_R: jax.Array, rows: Rows) -> tuple[State, jax.Array]:
    """The logits after one token more of each row. A row without a position is nobody's."""
    with float32_means_float32(shape.dtype):
        x_R1D, cache = hidden_over_pages(shape, weights, state.cache, state.token_B[slot_R][:, None], rows)
        logits_RV = last_logits(shape, weights, x_R1D[:, 0])
    return state._replace(cache=cache), logits_RV


def prefill(
    shape: Shape,
    scored: bool,
    weights: Tree,
    state: State,
    rows: Rows,
    tokens_RT: jax.Array,
    count_R: jax.Array,
    target_RT: jax.Array | None = None,
) -> tuple[State, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """The chunk's keys and values, and the logits after its last token. count_R: tokens of the chunk. scored: as well
    the log-probability of each target, and whether it is the most likely token.
    """
    with float32_means_float32(shape.dtype):
        x_RTD, cache = hidden_over_pages(shape, weights, state.cache, tokens_RT, rows)
        x_R1D = jnp.take_along_axis(x_RTD, (count_R - 1)[:, None, None], axis=1)
        logits_RV = last_logits(shape, weights, x_R1D[:, 0])
        scores = score(shape, weights, x_RTD, target_RT) if scored and target_RT is not None else None
    return state._replace(cache=cache), logits_RV, scores


def last_logits(shape: Shape, weights: Tree, x_RD: jax.Array) -> jax.Array:
    """Capped float32 logits_RV."""
    dtype = x_RD.dtype if shape.int8 else weights["embedding_VD"].dtype
    R, few = len(x_RD), FEWEST_ROWS if x_RD.dtype != dtype else 0
    x_RD = jnp.pad(x_RD.astype(dtype), ((0, max(0, few - R)), (0, 0)))
    return all_logits(shape, weights, x_RD[None])[0, :R]


def score(shape: Shape, weights: Tree, x_RTD: jax.Array, target_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits of SCORED positions at a time."""
    R, T, D = x_RTD.shape
    size = min(SCORED, T)

    def part(_: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_RtD, target_Rt = xs
        logits_RtV = all_logits(shape, weights, x_RtD)
        chosen_Rt = jnp.take_along_axis(logits_RtV, target_Rt[..., None], axis=-1)[..., 0]
        likeliest_Rt = jnp.argmax(logits_RtV, axis=-1)
        return None, (chosen_Rt - jax.nn.logsumexp(logits_RtV, axis=-1), likeliest_Rt == target_Rt)

    parts = x_RTD.reshape(R, T // size, size, D).swapaxes(0, 1), target_RT.reshape(R, T // size, size).swapaxes(0, 1)
    _, found = jax.lax.scan(part, None, parts)
    logprob_RT, greedy_RT = (x.swapaxes(0, 1).reshape(R, T) for x in found)
    return logprob_RT, greedy_RT


def pick(
    logprobs: bool, state: State, slot_R: jax.Array, position_R: jax.Array, logits_RV: jax.Array
) -> tuple[State, Picked]:
    """position_R: of the token that went in; -1 where nothing is to be chosen."""
    numbers = sampling.Numbers(*(x[slot_R] for x in state.numbers))
    token_R = sampling.choose(logits_RV, numbers, position_R + 1, state.counts_BV[slot_R], state.seen_BV[slot_R])
    to_R = jnp.where(position_R >= 0, slot_R, state.token_B.shape[0])  # out of bounds: dropped
    state = state._replace(
        token_B=state.token_B.at[to_R].set(token_R, mode="drop"),
        counts_BV=state.counts_BV.at[to_R, token_R].add(1, mode="drop"),
    )
    nothing_R = jnp.zeros(token_R.shape, jnp.float32)
    L = min(MOST_LOGPROBS, logits_RV.shape[1]) if logprobs else 0
    if not logprobs:
        return state, Picked(token_R, nothing_R, jnp.zeros((len(token_R), 0), jnp.int32), jnp.zeros((len(token_R), 0)))
    total_R1 = jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
    top_RL, at_RL = jax.lax.top_k(logits_RV, L)
    chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1) - total_R1
    return state, Picked(token_R, chosen_R[:, 0], at_RL.astype(jnp.int32), top_RL - total_R1)


def admit(state: State, slot: jax.Array, numbers: sampling.Numbers, counts_V: jax.Array, seen_V: jax.Array) -> State:
    return state._replace(
        counts_BV=state.counts_BV.at[slot].set(counts_V),
        seen_BV=state.seen_BV.at[slot].set(seen_V),
        numbers=sampling.Numbers(*(x.at[slot].set(y[0]) for x, y in zip(state.numbers, numbers, strict=True))),
    )


@dataclass(frozen=True)
class Underway:
    """A plan whose programs are sent."""

    plan: Plan
    chunks: list[tuple[Chunk, Picked | None, tuple[jax.Array, jax.Array] | None]]
    steps: list[Picked]


def send(engine: Engine, plan: Plan) -> Underway:
    """Has the devices do what a plan says, and waits for nothing."""
    for one in plan.admits:
        send_admit(engine, one)
    chunks = [send_chunk(engine, one) for one in plan.chunks]
    return Underway(plan, chunks, send_rows(engine, plan.rows, plan.steps) if plan.rows else [])


def send_admit(engine: Engine, one: Admit) -> None:
    V = engine.shape.model.vocab
    counts_V = np.bincount(np.array(one.counted, np.int64), minlength=V)[:V].astype(np.int16)
    seen_V = np.zeros(V, bool)
    seen_V[np.array(one.seen, np.int64)] = True
    numbers = sampling.numbers_of([one.sampling])
    engine.state = engine.programs["admit", 1](engine.state, np.int32(one.slot), numbers, counts_V, seen_V)
    (engine.with_logprobs.discard if one.sampling.logprobs is None else engine.with_logprobs.add)(one.slot)


def send_chunk(engine: Engine, one: Chunk) -> tuple[Chunk, Picked | None, tuple[jax.Array, jax.Array] | None]:
    limits, count = engine.limits, len(one.tokens)
    T = next(size for size in limits.chunks if size >= count)
    tokens_1T, target_1T, position_1T = (np.zeros((1, T), np.int32) for _ in range(3))
    tokens_1T[0, :count] = one.tokens
    target_1T[0, scored_in(one)] = one.targets
    position_1T[:] = -1
    position_1T[0, :count] = np.arange(one.start, one.start + count)
    given = host_rows(limits, position_1T, [one.tables], T), tokens_1T, np.array([count], np.int32)
    name, more = ("score", (target_1T,)) if one.targets else ("prefill", ())
    program = engine.programs[name, T]
    engine.state, logits_1V, scores = program(engine.weights, engine.state, *given, *more)
    if not one.sample:
        return one, None, scores
    slot_1, position_1 = (np.array([value], np.int32) for value in (one.slot, one.start + count - 1))
    program = engine.programs["pick", 1, one.slot in engine.with_logprobs]
    engine.state, picked = program(engine.state, slot_1, position_1, logits_1V)
    return one, picked, scores


def scored_in(one: Chunk) -> slice:
    return slice(one.scores_from, one.scores_from + len(one.targets)) if one.targets else slice(0, 0)


def send_rows(engine: Engine, rows: Sequence[Row], steps: int) -> list[Picked]:
    limits = engine.limits
    R = next(size for size in limits.rows if size >= len(rows))
    logprobs = any(row.slot in engine.with_logprobs for row in rows)
    slot_R, position_R1 = np.zeros(R, np.int32), np.full((R, 1), -1, np.int32)
    slot_R[: len(rows)] = [row.slot for row in rows]
    position_R1[: len(rows), 0] = [row.position for row in rows]
    program, choose = engine.programs["decode", R], engine.programs["pick", R, logprobs]
    found = []
    for step in range(steps):
        there_R1 = np.where(position_R1 >= 0, position_R1 + step, -1)
        given = host_rows(limits, there_R1, [row.tables for row in rows], 1)
        engine.state, logits_RV = program(engine.weights, engine.state, slot_R, given)
        engine.state, picked = choose(engine.state, slot_R, there_R1[:, 0], logits_RV)
        found.append(picked)
    return found


def host_rows(limits: Limits, position_RT: np.ndarray, tables: Sequence[tuple[Table, Table]], T: int) -> Rows:
    """Of local layers the pages from the first on that the chunk sees: what lies before is left out."""
    R, page = len(position_RT), limits.page
    local_RJ = np.zeros((R, limits.local_pages_seen(T)), np.int32)
    first_R = np.zeros(R, np.int32)
    global_RJ = np.zeros((R, limits.pages_seen), np.int32)
    for row, (local, whole) in enumerate(tables):
        seen = max(0, int(position_RT[row, 0]) - limits.window + 1) // page
        pages = local.pages[max(0, seen - local.first) :]
        first_R[row] = max(local.first, seen)
        local_RJ[row, : len(pages)] = pages[: local_RJ.shape[1]]
        global_RJ[row, : len(whole.pages)] = whole.pages[: global_RJ.shape[1]]
    return Rows(position_RT, local_RJ, first_R, global_RJ)


def receive(engine: Engine, underway: Underway) -> Answer:
    """Waits until a plan is done."""
    chunks, steps = jax.device_get(([one[1:] for one in underway.chunks], underway.steps))
    chosen: dict[int, list[tuple[Picked, int]]] = {}
    scored = {}
    for (chunk, _, _), (picked, scores) in zip(underway.chunks, chunks, strict=True):
        if chunk.sample:
            chosen.setdefault(chunk.slot, []).append((picked, 0))
        if chunk.targets:
            scored[chunk.slot] = Scored(*(tuple(x[0, scored_in(chunk)].tolist()) for x in scores))
    for picked in steps:
        for row, one in enumerate(underway.plan.rows):
            chosen.setdefault(one.slot, []).append((picked, row))
    found = {slot: as_chosen(picks, slot in engine.with_logprobs) for slot, picks in chosen.items()}
    return Answer(underway.plan.number, found, scored)


def as_chosen(picks: Sequence[tuple[Picked, int]], logprobs: bool) -> Chosen:
    tokens = tuple(int(picked.token_R[row]) for picked, row in picks)
    if not logprobs:
        return Chosen(tokens)
    top = tuple(
        tuple(zip(picked.top_RL[row].tolist(), picked.top_logprob_RL[row].tolist(), strict=True))
        for picked, row in picks
    )
    return Chosen(tokens, tuple(float(picked.logprob_R[row]) for picked, row in picks), top)
