"""The next token of each row: penalties, bias, temperature, top_k, top_p, min_p, and noise of the row's own.

B rows, V vocabulary, M biases of a row. What no row asks for is not computed. A row's token depends on its logits, its
own numbers, its seed and its position, and on nothing else in the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma.batching.plans import MOST_BIASES, Sampling

NOBODY = -jnp.inf


class Numbers(NamedTuple):
    """`Sampling`, an entry a slot."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    seed: jax.Array  # uint32 [B, 2]
    frequency: jax.Array
    presence: jax.Array
    repetition: jax.Array
    bias_token: jax.Array  # [B, M], V where there is none
    bias: jax.Array  # [B, M]


def no_numbers(slots: int) -> Numbers:
    """Of slots that nobody has: the most likely token."""
    zeros, ones = np.zeros(slots, np.float32), np.ones(slots, np.float32)
    biases = np.full((slots, MOST_BIASES), np.iinfo(np.int32).max, np.int32), np.zeros((slots, MOST_BIASES), np.float32)
    seed = np.zeros((slots, 2), np.uint32)
    return Numbers(zeros, ones, np.zeros(slots, np.int32), zeros, seed, zeros, zeros, ones, *biases)  # type: ignore


def numbers_of(samplings: Sequence[Sampling]) -> Numbers:
    """Host arrays."""
    found = no_numbers(len(samplings))
    names = ("temperature", "top_p", "top_k", "min_p", "frequency", "presence", "repetition")
    columns = {
        name: np.array([getattr(one, name) for one in samplings], np.asarray(getattr(found, name)).dtype)
        for name in names
    }
    for row, one in enumerate(samplings):
        found.seed[row] = one.seed & 0xFFFFFFFF, one.seed >> 32 & 0xFFFFFFFF
        for column, (token, value) in enumerate(one.bias[:MOST_BIASES]):
            found.bias_token[row, column], found.bias[row, column] = token, value
    return found._replace(**columns)  # type: ignore[arg-type]


def choose(
    logits_BV: jax.Array, numbers: Numbers, position_B: jax.Array, counts_BV: jax.Array, seen_BV: jax.Array
) -> jax.Array:
    """int32 [B]. position_B: of the token chosen. counts_BV: how often a row has chosen each token. seen_BV: whether it
    is in the row's prompt.
    """
    penalties = (numbers.frequency != 0) | (numbers.presence != 0) | (numbers.repetition != 1)
    logits_BV = jax.lax.cond(jnp.any(penalties), penalised, lambda x, *_: x, logits_BV, numbers, counts_BV, seen_BV)
    biased = jnp.any(numbers.bias_token < logits_BV.shape[1])
    logits_BV = jax.lax.cond(biased, with_bias, lambda x, _: x, logits_BV, numbers)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn(logits_BV: jax.Array) -> jax.Array:
        scaled_BV = logits_BV / jnp.where(numbers.temperature > 0, numbers.temperature, 1.0)[:, None]
        cut = (numbers.top_k > 0) | (numbers.top_p < 1) | (numbers.min_p > 0)
        kept_BV = jax.lax.cond(jnp.any(cut), kept, lambda x, _: jnp.ones_like(x, bool), scaled_BV, numbers)
        noisy_BV = jnp.where(kept_BV, scaled_BV, NOBODY) + noise(numbers.seed, position_B, scaled_BV.shape[1])
        return jnp.where(numbers.temperature > 0, jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32), greedy_B)

    return jax.lax.cond(jnp.any(numbers.temperature > 0), drawn, lambda _: greedy_B, logits_BV)


def penalised(logits_BV: jax.Array, numbers: Numbers, counts_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
    """Repetition as in the CTRL paper (arXiv:1909.05858), prompt included; frequency and presence as OpenAI's API."""
    there_BV = (counts_BV > 0) | seen_BV
    factor_BV = jnp.where(there_BV, numbers.repetition[:, None], 1.0)
    logits_BV = jnp.where(logits_BV > 0, logits_BV / factor_BV, logits_BV * factor_BV)
    logits_BV = logits_BV - numbers.frequency[:, None] * counts_BV
    return logits_BV - numbers.presence[:, None] * (counts_BV > 0)


def with_bias(logits_BV: jax.Array, numbers: Numbers) -> jax.Array:
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, numbers.bias_token].add(numbers.bias, mode="drop")


def kept(scaled_BV: jax.Array, numbers: Numbers) -> jax.Array:
    """Which tokens may be drawn. top_k first, then top_p of what it leaves, then min_p; of equals all are kept.

    Nothing is sorted: the lowest logit that is kept is found by bisection over the bits of a float.
    """
    V = scaled_BV.shape[1]
    bits_BV = ordered(scaled_BV)
    wanted_B = jnp.where(numbers.top_k > 0, jnp.minimum(numbers.top_k, V), V).astype(jnp.float32)
    lowest_B = bisect(lambda at_B: jnp.sum(bits_BV >= at_B[:, None], axis=-1).astype(jnp.float32) >= wanted_B, bits_BV)
    weights_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
    weights_BV = jnp.where(bits_BV >= lowest_B[:, None], weights_BV, 0.0)
    mass_B = jnp.where(numbers.top_p < 1, numbers.top_p, 0.0) * jnp.sum(weights_BV, axis=-1)

    def enough(at_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(bits_BV >= at_B[:, None], weights_BV, 0.0), axis=-1) >= mass_B

    nucleus_B = jnp.where(numbers.top_p < 1, bisect(enough, bits_BV), lowest_B)
    kept_BV = bits_BV >= jnp.maximum(lowest_B, nucleus_B)[:, None]
    return kept_BV & (weights_BV >= numbers.min_p[:, None])  # the most likely token's weight is 1


def ordered(x: jax.Array) -> jax.Array:
    """uint32, in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def bisect(enough, bits_BV: jax.Array) -> jax.Array:  # type: ignore[no-untyped-def]
    """The largest number at which enough is kept: bit by bit from the highest."""

    def body(step: jax.Array, at_B: jax.Array) -> jax.Array:
        tried_B = at_B | jnp.uint32(1) << (jnp.uint32(31) - step.astype(jnp.uint32))
        return jnp.where(enough(tried_B), tried_B, at_B)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(bits_BV.shape[0], jnp.uint32))


def noise(seed_B2: jax.Array, position_B: jax.Array, V: int) -> jax.Array:
    """Gumbel noise: the token with the largest sum of logit and noise is drawn with its probability."""

    def row(seed_2: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(
            jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), position), (V,)
        )

    return jax.vmap(row)(seed_B2, position_B)
