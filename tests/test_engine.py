"""The engine is exact: whatever it is asked together, in whatever pieces, is what the whole forward pass says."""

import importlib.util
import json
import random
from collections import deque
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma.batching import schedule
from gemma.batching.plans import Limits, Sampling
from gemma.batching.schedule import Batch, Sequence
from gemma.config import Model
from gemma.engine import engine as engines
from gemma.engine import server
from gemma.engine.engine import Engine
from gemma.engine.forward import Shape
from gemma.model.load import load_params
from gemma.model.sharding import sharding
from gemma.model.transformer import Gemma
from tests import hf_cases

GREEDY = Sampling(temperature=0)
# Caps that bite, a window far shorter than the sequences, head sizes and widths that are no powers of two.
MODELS = {
    name: replace(model, vocab=40, context=96, window=7, attention_cap=3.0, final_cap=2.0)
    for name, model in hf_cases.CASES.items()
}
CLOSE = 1e-4  # of log-probabilities in float32


def limits(**changes: Any) -> Limits:
    made = Limits(4, 96, 4, 7, 60, 40, rows=(4,), chunks=(4, 16))
    return replace(made, **changes)


def opened(name: str, tensor: int, cache_dir: Path, int8: bool = False, **changes: Any) -> tuple[Gemma, Engine]:
    model = MODELS[name]
    gemma = Gemma(model, rngs=nnx.Rngs(1))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:tensor]).reshape(1, 1, tensor), ("replica", "fsdp", "tensor"))

    def placed(leaf: nnx.Param) -> jax.Array:
        return jax.device_put(leaf[...], sharding(mesh, leaf.axes))

    params = jax.tree.map(placed, nnx.state(gemma), is_leaf=lambda x: isinstance(x, nnx.Variable))
    shape = Shape(model, "float32", mesh, int8)
    return gemma, engines.open_engine(shape, nnx.to_pure_dict(params), limits(**changes), cache_dir)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", params=[("pairs-of-heads", 1), ("pairs-of-heads", 2), ("odd-widths", 1)], ids=str)
def both(request: pytest.FixtureRequest, programs: Path) -> tuple[Gemma, Engine]:
    return opened(*request.param, programs)


def run(engine: Engine, batch: Batch, sequences: list[Sequence], seed: int = 0) -> dict[int, list[schedule.News]]:
    """Two plans under way, of one to four decode steps; what came of each sequence, by its id."""
    rng, flight = random.Random(seed), deque()  # type: ignore[var-annotated]
    found: dict[int, list[schedule.News]] = {one.id: [] for one in sequences}
    for one in sequences:
        assert schedule.refusal(batch.limits, one) is None
        schedule.submit(batch, one)
    while not schedule.idle(batch) or flight:
        plan = schedule.plan(batch, rng.randint(1, 4), 16)
        if not plan.empty:
            flight.append(engines.send(engine, plan))
        if len(flight) >= 2 or plan.empty:
            for item in schedule.take_answer(batch, engines.receive(engine, flight.popleft())):
                found[item.sequence.id].append(item)
    return found


@cache
def forward(gemma: Gemma) -> Any:
    return nnx.jit(lambda model, tokens_BT: jax.nn.log_softmax(model(tokens_BT), axis=-1))


def logprobs(gemma: Gemma, tokens: list[int]) -> np.ndarray:
    """[T, V] of the whole forward pass; padded to one length, which changes nothing before."""
    padded = jnp.zeros((1, 96), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
    return np.asarray(forward(gemma)(gemma, padded)[0, : len(tokens)])


def prompts(vocab: int, seed: int, count: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    common = [rng.randrange(4, vocab) for _ in range(40)]
    own = [[rng.randrange(4, vocab) for _ in range(rng.randint(1, 24))] for _ in range(count)]
    return [tuple(common[: rng.choice([0, 0, 24, 33])] + one) for one in own]


@pytest.mark.parametrize("global_pages", [60, 26], ids=["roomy", "tight"])
def test_greedy_tokens_are_those_of_the_whole_forward_pass(both: tuple[Gemma, Engine], global_pages: int) -> None:
    """At lengths beyond three windows, in chunks, beside others, with beginnings that are shared, and put back."""
    gemma, engine = both
    batch = schedule.open_batch(replace(engine.limits, global_pages=global_pages))
    made = [
        Sequence(number, prompt, replace(GREEDY, logprobs=3 if number % 2 else None), 30, frozenset())
        for number, prompt in enumerate(prompts(engine.shape.model.vocab, 0, 12))
    ]
    found = run(engine, batch, made)
    assert batch.found > 0
    assert (batch.put_back > 0) == (global_pages == 26)
    for one in made:
        whole = logprobs(gemma, [*one.prompt, *one.tokens])[len(one.prompt) - 1 : -1]
        assert one.tokens == whole.argmax(axis=-1).tolist()
        if one.sampling.logprobs is None:
            continue
        chosen = [item.chosen for item in found[one.id] if item.chosen]
        got = np.array([value for part in chosen for value in part.logprobs])
        np.testing.assert_allclose(got, whole.max(axis=-1), atol=CLOSE, rtol=0)
        for row, top in zip(whole, [place for part in chosen for place in part.top], strict=True):
            np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][: len(top)], atol=CLOSE, rtol=0)


def test_scores_are_the_log_probabilities_of_the_whole_forward_pass(both: tuple[Gemma, Engine]) -> None:
    gemma, engine = both
    batch = schedule.open_batch(engine.limits)
    made = [
        Sequence(number, (prompt * 2)[:90], GREEDY, 0, frozenset(), score_from=min(len(prompt), 5))
        for number, prompt in enumerate(prompts(engine.shape.model.vocab, 1, 8))
    ]
    starts = {one.id: one.score_from for one in made}
    found = run(engine, batch, made)
    for one in made:
        whole, first = logprobs(gemma, list(one.prompt)), starts[one.id]
        assert first is not None
        scored = [item.scored for item in found[one.id] if item.scored]
        got = np.array([value for part in scored for value in part.logprobs])
        targets = np.array(one.prompt[first:])
        np.testing.assert_allclose(got, whole[np.arange(first - 1, len(one.prompt) - 1), targets], atol=CLOSE, rtol=0)
        greedy = [flag for part in scored for flag in part.greedy]
        assert greedy == (whole[first - 1 : -1].argmax(axis=-1) == targets).tolist()


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(both: tuple[Gemma, Engine]) -> None:
    """In another slot, in other chunks, put back, and with its beginning found or computed."""
    _, engine = both
    sampled = Sampling(temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, frequency=0.3, presence=0.2, repetition=1.2)
    given = prompts(engine.shape.model.vocab, 2, 10)

    def sequences() -> list[Sequence]:
        return [Sequence(n, p, replace(sampled, seed=100 + n), 25, frozenset()) for n, p in enumerate(given)]

    crowd, tight = sequences(), sequences()
    run(engine, schedule.open_batch(engine.limits), crowd, seed=1)
    batch = schedule.open_batch(replace(engine.limits, global_pages=26))
    run(engine, batch, list(reversed(tight)), seed=2)
    assert batch.put_back > 0
    for one, other in zip(sequences(), crowd, strict=True):
        run(engine, schedule.open_batch(engine.limits), [one], seed=3)
        assert one.tokens == other.tokens == tight[one.id].tokens


@pytest.mark.parametrize("case", hf_cases.CASES)
def test_greedy_tokens_are_those_that_transformers_generates(case: str, tmp_path: Path) -> None:
    """By golden file; and live, where it is installed."""
    model = hf_cases.CASES[case]
    engine = of_folder(hf_cases.write_folder(tmp_path / "hf", model), model, tmp_path)
    made = [
        Sequence(n, tuple(prompt), GREEDY, hf_cases.NEW_TOKENS, frozenset())
        for n, prompt in enumerate(hf_cases.prompts(model))
    ]
    run(engine, schedule.open_batch(engine.limits), made)
    found = [one.tokens for one in made]
    assert found == json.loads(hf_cases.SERVE_GOLDENS.read_text())["generated"][case]
    if importlib.util.find_spec("transformers"):
        from tests.make_serve_goldens import generated

        assert found == generated(model)


def of_folder(folder: Path, model: Model, cache_dir: Path, page: int = 4) -> Engine:
    """As a host opens it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("replica", "fsdp", "tensor"))
    params = load_params(str(folder), server.abstract_params(model, mesh, "float32"))
    pages = 4 * model.context // page
    made = Limits(4, model.context, page, model.window, pages, pages, (4,), (16,))
    return engines.open_engine(Shape(model, "float32", mesh), params, made, cache_dir)


@pytest.mark.parametrize("tensor", [1, 2])
def test_weights_in_int8_give_nearly_what_they_were(tensor: int, programs: Path) -> None:
    """Scores move by a rounding of one part in 255 of each output's largest weight, and no more."""
    gemma, engine = opened("pairs-of-heads", tensor, programs, int8=True)
    assert str(engine.weights["layers"][0]["q_DE"].value.dtype) == "int8"
    prompt = prompts(40, 5, 8)[0][:1] + tuple(range(4, 39)) * 2
    one = Sequence(0, prompt[:90], GREEDY, 0, frozenset(), score_from=1)
    scored = [item.scored for item in run(engine, schedule.open_batch(engine.limits), [one])[0] if item.scored]
    got = np.array([value for part in scored for value in part.logprobs])
    wanted = logprobs(gemma, list(one.prompt))[np.arange(len(one.prompt) - 1), np.array(one.prompt[1:])]
    assert 1e-5 < np.abs(got - wanted).mean() < 0.02
    assert np.abs(got - wanted).max() < 0.1


def test_nothing_is_compiled_while_plans_are_done(both: tuple[Gemma, Engine], caplog: pytest.LogCaptureFixture) -> None:
    _, engine = both
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    mixed = [GREEDY, replace(GREEDY, logprobs=2), Sampling(seed=1), Sampling(seed=2, top_k=3, bias=((5, 2.0),))]
    made = [
        Sequence(n, p, mixed[n % 4], 6, frozenset(), score_from=2 if n == 3 else None)
        for n, p in enumerate(prompts(engine.shape.model.vocab, 3, 8))
    ]
    compiled.clear()
    run(engine, schedule.open_batch(engine.limits), made)
    assert [event for event in compiled if "compile" in event] == []


def test_programs_for_some_of_the_devices_are_read_back(tmp_path: Path) -> None:
    """As where a server takes one chip of a simulated host: the second time nothing is compiled, and they run."""
    model = MODELS["odd-widths"]
    assert jax.device_count() > 1
    found = []
    for _ in range(2):
        gemma, engine = opened("odd-widths", 1, tmp_path)
        one = Sequence(0, (4, 5, 6), GREEDY, 5, frozenset())
        run(engine, schedule.open_batch(engine.limits), [one])
        found.append(one.tokens)
    abstract = server.abstract_params(model, engine.shape.mesh, "float32")
    assert engines.prepare(engine.shape, abstract, engine.limits, tmp_path)[1]
    assert found[0] == found[1]
    assert gemma is not None
