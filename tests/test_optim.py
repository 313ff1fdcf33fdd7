"""The schedule, what decays, the reported norms and the clipping of one update."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gemma import schedule as schedules
from gemma.config import ConfigError, Mesh, Optim, Program
from gemma.model.sharding import make_mesh
from gemma.model.transformer import Gemma
from gemma.train import guard, optim
from gemma.train.step import TrainState, update

STEPS = 50


@pytest.fixture
def config(program: Program) -> Optim:
    return replace(program.optim, lr=0.4, warmup_steps=10, decay_steps=STEPS, final_lr_ratio=0.25)


SCHEDULES = ["cosine", "linear", "wsd", "constant"]


def begun(config: Optim, name: str, steps: int = STEPS) -> Optim:
    """As of a run that began with so many steps."""
    return schedules.resolved(replace(config, schedule=name, decay_steps=None), steps)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_by_equal_steps_and_ends_at_lr(config: Optim, name: str) -> None:
    rates = [optim.schedule(begun(config, name))(step) for step in range(11)]
    np.testing.assert_allclose(rates, [0.04 * step for step in range(1, 11)] + [0.4], rtol=1e-6)


@pytest.mark.parametrize(
    "name, halfway, end",
    [("cosine", 0.4 * (1 + 0.25) / 2, 0.1), ("linear", 0.4 * (1 + 0.25) / 2, 0.1), ("wsd", 0.4, 0.1)]
    + [("constant", 0.4, 0.4)],
)
def test_the_schedule_ends_at_its_final_ratio(config: Optim, name: str, halfway: float, end: float) -> None:
    schedule = optim.schedule(begun(config, name))
    np.testing.assert_allclose([schedule(30), schedule(STEPS), schedule(STEPS + 5)], [halfway, end, end], rtol=1e-6)


def test_cosine_lies_above_linear_in_its_first_half(config: Optim) -> None:
    cosine, linear = (optim.schedule(begun(config, name))(20) for name in ("cosine", "linear"))
    assert float(cosine) == pytest.approx(0.4 * (0.25 + 0.75 * (1 + np.cos(np.pi / 4)) / 2), rel=1e-6)
    assert cosine > linear


@pytest.mark.parametrize("wsd_decay_steps, begins", [(None, 45), (10, 40), (40, 10)])
def test_wsd_stays_at_lr_until_its_decay_which_is_linear(
    config: Optim, wsd_decay_steps: int | None, begins: int
) -> None:
    schedule = optim.schedule(begun(replace(config, wsd_decay_steps=wsd_decay_steps), "wsd"))
    half = (begins + STEPS) / 2
    np.testing.assert_allclose([schedule(begins), schedule(half)], [0.4, 0.25], rtol=1e-6)
    assert {float(schedule(step)) for step in range(10, begins)} <= {np.float32(0.4)}
    assert float(schedule(begins + 1)) < 0.4


def test_wsd_without_a_decay_goes_on_at_lr(config: Optim) -> None:
    endless = begun(replace(config, wsd_decay_steps=0), "wsd")
    assert float(optim.schedule(endless)(10 * STEPS)) == pytest.approx(0.4)
    branch = replace(endless, decay_steps=200, wsd_decay_steps=50)  # decays from any checkpoint of the stable part
    assert schedules.rate(branch, 150) == schedules.rate(endless, 150)
    assert schedules.rate(branch, 200) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_that_a_command_prints_is_the_rate_that_is_trained_with(
    config: Optim, name: str, warmup_steps: int
) -> None:
    ready = begun(replace(config, warmup_steps=warmup_steps), name)
    trained = [optim.schedule(ready)(step) for step in range(STEPS + 3)]
    np.testing.assert_allclose(trained, [schedules.rate(ready, step) for step in range(STEPS + 3)], rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps, warmup_steps", [(1, 0), (3, 10), (50, 10)])
def test_every_number_of_steps_gives_a_schedule_that_keeps_its_rules(
    config: Optim, name: str, steps: int, warmup_steps: int
) -> None:
    rates = [schedules.rate(begun(replace(config, warmup_steps=warmup_steps), name, steps), i) for i in range(100)]
    assert max(rates) == pytest.approx(0.4)
    assert all(a >= b for a, b in zip(rates[warmup_steps:], rates[warmup_steps + 1 :], strict=False))


@pytest.mark.parametrize("keys", [{"decay_steps": 10}, {"wsd_decay_steps": 41}, {"wsd_decay_steps": -1}])
def test_lengths_that_do_not_fit_the_warm_up_are_refused(config: Optim, keys: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"^optim.{next(iter(keys))}="):
        replace(config, **keys)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_the_first_step_already_learns(config: Optim, warmup_steps: int) -> None:
    assert float(optim.schedule(replace(config, warmup_steps=warmup_steps))(0)) == pytest.approx(0.4)


def test_weight_decay_leaves_exactly_the_norms_alone(config: Optim, program: Program) -> None:
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Gemma(program.model, rngs=nnx.Rngs(0)))))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    tx = optim.optimizer(replace(config, warmup_steps=0, weight_decay=0.1))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for path, change in jax.tree.leaves_with_path(updates):
        is_norm = path[-1].key in ("norms_P4D", "final_norm")
        np.testing.assert_allclose(change, 0.0 if is_norm else -0.4 * 0.1, rtol=1e-6, err_msg=str(path))


def test_global_norms_are_the_l2_norms_of_the_whole_trees() -> None:
    mesh = make_mesh(Mesh(replica=2, fsdp=2, tensor=2))
    specs = {
        "whole": PartitionSpec(),
        "fsdp": PartitionSpec(None, "fsdp"),
        "both": PartitionSpec("tensor", "fsdp"),
        "batch": PartitionSpec(("replica", "fsdp"), None),
    }
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    rng = np.random.default_rng(0)
    trees = tuple({name: rng.normal(size=(4, 6)).astype(np.float32) for name in specs} for _ in range(2))
    got = jax.jit(partial(optim.global_norms, places=places))(jax.device_put(trees, (places, places)))
    np.testing.assert_allclose(got, [optax.tree.norm(tree) for tree in trees], rtol=1e-6)


def one_update(program: Program, clip_norm: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The change of the parameters and the metrics where 4 targets have a gradient sum of norm 4 * 5."""
    place = NamedSharding(jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1]), PartitionSpec())
    grads = {"weight": jnp.asarray([12.0, 0.0]), "norm": jnp.asarray([16.0])}
    params = jax.tree.map(jnp.zeros_like, grads)
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_schedule(optax.constant_schedule(1.0)))
    made = optax.tree.set(tx.init(params), count=jnp.asarray(2, jnp.int32))  # of three steps one was not applied
    state = TrainState(jnp.asarray(3, jnp.int32), params, made, guard.fresh())
    changed = replace(program, optim=replace(program.optim, clip_norm=clip_norm))
    after, metrics = update(
        changed,
        lambda params, tokens_BU: (jnp.asarray(10.0), jnp.asarray(4.0), grads),
        tx,
        jax.tree.map(lambda _: place, grads),
        state,
        jnp.zeros((1, 2), jnp.int32),
    )
    assert int(after.step) == 4
    return after.params, metrics


@pytest.mark.parametrize("clip_norm, length", [(None, 5.0), (7.0, 5.0), (0.5, 0.5)])
def test_clipping_shortens_a_longer_gradient_and_keeps_its_direction(
    program: Program, clip_norm: float | None, length: float
) -> None:
    change, _ = one_update(program, clip_norm)
    np.testing.assert_allclose(change["weight"], [-0.6 * length, 0.0], rtol=1e-6)
    np.testing.assert_allclose(change["norm"], [-0.8 * length], rtol=1e-6)


def test_metrics_are_means_over_targets_before_clipping(program: Program) -> None:
    _, metrics = one_update(program, 0.5)
    want = {"loss": 2.5, "grad_norm": 5.0, "param_norm": 0.0, "targets": 4.0, "ok": 1.0}
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want)


def test_the_reported_rate_is_that_of_the_updates_made_not_of_the_steps(program: Program) -> None:
    _, metrics = one_update(program, None)
    schedule = optim.schedule(program.optim)
    assert float(metrics["learning_rate"]) == float(schedule(2)) != float(schedule(3))
