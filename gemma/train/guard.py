"""Which updates are good: finite, and no spike. The statistics that tell a spike are part of the train state.

They live there so that a checkpoint restores them to the bit, and the steps after it judge as they would have judged.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma.config import Guard

Tree = Any
RATE = 0.01  # the weight of the newest step in the running mean, once 1 / RATE steps have been seen
SMALLEST_NORM = 1e-30  # so that no gradient at all has a logarithm too


class Seen(NamedTuple):
    """What an array of statistics holds: scalars."""

    loss_mean: jax.Array
    loss_variance: jax.Array
    log_norm_mean: jax.Array
    log_norm_variance: jax.Array
    steps: jax.Array  # good ones; stands still at 2**24, where float32 cannot count on


def fresh() -> jax.Array:
    """The statistics of a run that has seen nothing."""
    return jnp.zeros(len(Seen._fields), jnp.float32)


def is_good(config: Guard, statistics: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """bool: loss and gradient are finite and, where config looks for spikes, neither is one.

    A spike lies more than config.spike_sigmas standard deviations above the running mean: the loss above its own, the
    gradient norm, whose size varies by factors, above its own by their logarithms.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.spike_sigmas == 0:
        return good
    seen = Seen(*statistics)
    spike = above(config.spike_sigmas, loss, seen.loss_mean, seen.loss_variance)
    spike |= above(config.spike_sigmas, log(grad_norm), seen.log_norm_mean, seen.log_norm_variance)
    return good & ~(spike & (seen.steps >= config.warmup))


def above(sigmas: float, x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    return x - mean > sigmas * jnp.sqrt(variance)


def log(grad_norm: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(grad_norm, SMALLEST_NORM))


def learned(statistics: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """The statistics after a good step: plain mean and variance of the first 1 / RATE, exponential ones from there."""
    seen = Seen(*statistics)
    rate = jnp.maximum(1 / (seen.steps + 1), RATE)
    loss_moments = moments(rate, loss, seen.loss_mean, seen.loss_variance)
    norm_moments = moments(rate, log(grad_norm), seen.log_norm_mean, seen.log_norm_variance)
    return jnp.stack([*loss_moments, *norm_moments, seen.steps + 1])


def moments(rate: jax.Array, x: jax.Array, mean: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Running mean and variance with one more value."""
    away = x - mean
    return mean + rate * away, (1 - rate) * (variance + rate * away * away)


def kept(good: jax.Array, new: Tree, old: Tree) -> Tree:
    """new where good, else old to the bit. Elementwise: it joins what made `new`, and nothing is held twice."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
