"""Cross-entropy that never holds the logits of all tokens.

B batch, T time, C chunk of time, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from gemma.model import logits


def cross_entropy_sum(
    x_BTD: jax.Array, embedding_VD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, *, cap: float, chunk: int
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), float32, in nats.

    Time is walked in chunks and each chunk's logits are made again in the backward pass, so at most
    [B, chunk, V] logits exist at once. Time is cut, not tokens: the batch stays cut over the mesh.
    Where chunk does not divide T the rest is padded with weight 0.
    """
    B, T, D = x_BTD.shape
    chunk = min(chunk, T)
    pad = -T % chunk

    def chunks(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, -1, chunk, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x_BCD, target_BC, weight_BC = xs
        logits_BCV = logits(x_BCD, embedding_VD, cap)
        picked_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        loss_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC
        return total + jnp.sum(loss_BC * weight_BC), None

    xs = (chunks(x_BTD), chunks(target_BT), chunks(weight_BT))
    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), xs)
    return total
