"""What is judged a bad update, and that a bad one leaves no trace.

B batch, U = T + 1.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma.checkpoint import disk
from gemma.config import Guard, Mesh, Program
from gemma.train import aot, data, guard, step
from gemma.train.trainer import Trainer
from tests.small_text import TEXTS, config, write_jsonl

OFF = Guard(action="skip", spike_sigmas=0.0, warmup=4, rollback_steps=1, budget=10)
ON = replace(OFF, spike_sigmas=3.0)
INFINITE, NAN, LARGE = 261, 262, 263  # tokens that spoil the loss of the batch they are in
TWO_MESHES = pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)


def learned(losses: list[float], norms: list[float]) -> jax.Array:
    statistics = guard.fresh()
    for loss, norm in zip(losses, norms, strict=True):
        statistics = guard.learned(statistics, jnp.float32(loss), jnp.float32(norm))
    return statistics


def is_good(settings: Guard, statistics: jax.Array, loss: float, norm: float) -> bool:
    return bool(guard.is_good(settings, statistics, jnp.float32(loss), jnp.float32(norm)))


@pytest.fixture
def losses() -> list[float]:
    return np.random.default_rng(0).normal(5.0, 0.5, 40).tolist()


@pytest.fixture
def norms() -> list[float]:
    return np.exp(np.random.default_rng(1).normal(0.0, 0.3, 40)).tolist()


@pytest.mark.parametrize("settings", [OFF, ON])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_on(settings: Guard, wrong: float) -> None:
    assert is_good(settings, guard.fresh(), 1.0, 1.0)
    assert not is_good(settings, guard.fresh(), wrong, 1.0)
    assert not is_good(settings, guard.fresh(), 1.0, wrong)


@pytest.mark.parametrize(("sigmas", "good"), [(2.9, True), (3.1, False), (-50.0, True)])
def test_a_loss_spikes_more_than_so_many_deviations_above_its_mean(
    losses: list[float], norms: list[float], sigmas: float, good: bool
) -> None:
    loss = np.mean(losses) + sigmas * np.std(losses)
    assert is_good(ON, learned(losses, norms), loss, norms[0]) is good


@pytest.mark.parametrize(("sigmas", "good"), [(2.9, True), (3.1, False), (-50.0, True)])
def test_a_gradient_spikes_more_than_so_many_deviations_above_the_mean_of_its_logarithm(
    losses: list[float], norms: list[float], sigmas: float, good: bool
) -> None:
    norm = np.exp(np.mean(np.log(norms)) + sigmas * np.std(np.log(norms)))
    assert is_good(ON, learned(losses, norms), losses[0], norm) is good


def test_zero_sigmas_look_for_no_spike(losses: list[float], norms: list[float]) -> None:
    assert is_good(OFF, learned(losses, norms), 1e6, 1e6)


@pytest.mark.parametrize(("warmup", "good"), [(40, False), (41, True)])
def test_nothing_spikes_before_so_many_good_steps(
    losses: list[float], norms: list[float], warmup: int, good: bool
) -> None:
    assert is_good(replace(ON, warmup=warmup), learned(losses, norms), 1e6, 1e6) is good


def test_the_statistics_follow_a_run_to_another_level() -> None:
    old, new = [5.0, 7.0] * 200, [1.0, 2.0] * 500
    seen = guard.Seen(*learned(old + new, [1.0] * 1400).tolist())  # type: ignore[arg-type]
    assert seen.loss_mean == pytest.approx(np.mean(new), abs=0.01)
    assert seen.loss_variance == pytest.approx(np.var(new), abs=0.01)


def test_a_step_without_any_gradient_leaves_statistics_that_still_judge() -> None:
    assert np.isfinite(learned([1.0, 1.0], [0.0, 1.0])).all()


class Steps:
    """The programs of one mesh, and states made by training on batches."""

    def __init__(self, program: Program, shape: tuple[int, int, int]):
        self.program = replace(program, mesh=Mesh(*shape))
        grid = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        mesh = jax.sharding.Mesh(grid, ("replica", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        self.functions = step.functions(self.program, mesh)
        self.train = self.functions.train.lower(self.functions.state, self.functions.batch).compile()
        self.init = self.functions.init.lower().compile()

    def after(self, *batches: tuple[int, int], state: Any = None) -> tuple[Any, list[dict[str, float]]]:
        """The state on the host and the metrics of every step. A batch is its number and a token that it holds."""
        state, rows = self.init() if state is None else state, []
        for number, token in batches:
            shape = self.functions.batch.shape
            tokens_BU = np.random.default_rng(number).integers(4, 260, shape, np.int32)
            tokens_BU[-1, 7] = token  # on the last device, in an input and a target
            placed = data.place(self.functions.batch, lambda start, stop, t=tokens_BU: t[start:stop])
            state, metrics = self.train(state, placed)
            rows.append({name: float(value) for name, value in metrics.items()})
        return jax.device_get(state), rows


HEALTHY = [(number, 4) for number in range(6)]


@pytest.fixture(scope="module")
def steps(program: Program) -> Iterator[Any]:
    """By settings and mesh. The loss of a batch that holds INFINITE, NAN or LARGE is what they say."""
    summed = step.loss_sum

    def spoiled(program: Program, graph: Any, params: Any, tokens_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, count = summed(program, graph, params, tokens_BU)
        factor = jnp.where(jnp.any(tokens_BU == NAN), jnp.nan, 1.0) * jnp.where(jnp.any(tokens_BU == LARGE), 9.0, 1.0)
        return total * factor + jnp.where(jnp.any(tokens_BU == INFINITE), jnp.inf, 0.0), count

    @cache
    def of(settings: Guard, shape: tuple[int, int, int]) -> Steps:
        return Steps(replace(program, guard=settings), shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "loss_sum", spoiled)
        yield of


def assert_same_bits(one: Any, other: Any) -> None:
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, other)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@TWO_MESHES
@pytest.mark.parametrize("token", [INFINITE, NAN])
def test_a_bad_batch_changes_nothing_but_the_step(steps: Any, shape: tuple[int, int, int], token: int) -> None:
    before, _ = steps(OFF, shape).after(*HEALTHY[:2])
    after, rows = steps(OFF, shape).after(*HEALTHY[:2], (2, token))
    assert [row["ok"] for row in rows] == [1.0, 1.0, 0.0]
    assert not np.isfinite(rows[-1]["loss"])  # what came is reported
    assert (before.step, after.step) == (2, 3)
    assert_same_bits(before[1:], after[1:])


def test_a_run_goes_on_after_a_bad_batch_as_if_it_had_not_been(steps: Any) -> None:
    without, expected = steps(OFF, (2, 2, 2)).after(*HEALTHY)
    state, rows = steps(OFF, (2, 2, 2)).after(*HEALTHY[:3], (9, NAN), *HEALTHY[3:])
    assert [row for row in rows if row["ok"]] == expected  # learning rates, too
    assert_same_bits(without[1:], state[1:])


@TWO_MESHES
def test_a_healthy_run_has_the_bits_it_has_unguarded(
    steps: Any, program: Program, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded, rows = steps(ON, shape).after(*HEALTHY)
    assert [row["ok"] for row in rows] == [1.0] * len(HEALTHY)
    monkeypatch.setattr(guard, "kept", lambda good, new, old: new)
    unguarded, _ = Steps(replace(program, guard=ON), shape).after(*HEALTHY)
    assert_same_bits(guarded, unguarded)


def test_a_spike_is_skipped_once_it_is_looked_for(steps: Any) -> None:
    judged = {}
    for name, settings in (("on", ON), ("off", OFF), ("early", replace(ON, warmup=7))):
        _, rows = steps(settings, (1, 1, 1)).after(*HEALTHY, (9, LARGE))
        judged[name] = rows[-1]["ok"]
    assert judged == {"on": 0.0, "off": 1.0, "early": 1.0}


def test_a_restored_state_judges_as_the_saved_one(steps: Any, program: Program, tmp_path: Path) -> None:
    made = steps(ON, (2, 2, 2))
    saved, _ = made.after(*HEALTHY)
    with disk.open_manager(tmp_path, program.checkpoint) as manager:
        disk.save(manager, len(HEALTHY), jax.tree.map(jax.numpy.asarray, saved))
        manager.wait_until_finished()
        restored = disk.restore(manager, len(HEALTHY), made.functions.state)
    assert_same_bits(saved, jax.device_get(restored))
    assert made.after((9, LARGE), state=restored)[1][0]["ok"] == 0.0
    assert made.after((9, LARGE))[1][0]["ok"] == 1.0  # a fresh state knows no spike


def test_what_is_compiled_depends_on_what_is_looked_for_and_not_on_what_is_done(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would be handed the compiled step of another."""
    monkeypatch.setattr(aot, "compiled", lambda name, jitted, args, facts, cache: (facts, True))
    text = config(write_jsonl(tmp_path / "a.jsonl", TEXTS))

    def facts(settings: Guard) -> Any:
        ours = replace(program, data=text, mesh=Mesh(1, 8, 1), guard=settings)
        return Trainer(ours, tmp_path, tmp_path / "cache").train

    assert facts(OFF) == facts(replace(OFF, action="stop", budget=3, rollback_steps=9))
    assert len({facts(ON), facts(OFF), facts(replace(ON, warmup=9))}) == 3
