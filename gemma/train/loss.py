"""Cross-entropy that never holds the logits of all tokens, and makes those of each token once.

B batch, T time, D width, V vocabulary, R the rows of a chunk: the tokens of some times, of the whole batch.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gemma.model.attention import soft_cap
from gemma.model.sharding import EMBEDDING_AXES, gather, scatter

Arrays = tuple[jax.Array, ...]


def cross_entropy_sum(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    cap: float,
    chunk: int,
    reduce_dtype: str = "float32",
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), float32, in nats, computed in x's dtype. Differentiable in x and the
    float32 embedding, which comes cut along `fsdp` where the program is manual over it; its gradient is summed over the
    tokens in float32, over `fsdp` in reduce_dtype.

    Time is walked in chunks, so at most [V, B * chunk] logits exist at once. Time is cut, not tokens: the batch stays
    cut over the mesh. Where chunk does not divide T the rest is padded with weight 0.
    """
    return total(cap, min(chunk, x_BTD.shape[1]), reduce_dtype, x_BTD, embedding_VD, target_BT, weight_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def total(
    cap: float,
    chunk: int,
    reduce_dtype: str,
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
) -> jax.Array:
    embedding_VD = gather(embedding_VD.astype(x_BTD.dtype), EMBEDDING_AXES)

    def body(total: jax.Array, xs: Arrays) -> tuple[jax.Array, None]:
        return total + chunk_loss(cap, embedding_VD, *xs)[0], None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), cut(chunk, x_BTD, target_BT, weight_BT))[0]


def forward(
    cap: float,
    chunk: int,
    reduce_dtype: str,
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
) -> tuple[jax.Array, Arrays]:
    """Computes the gradient here, while the logits exist: a sum's cotangent is only a scalar factor.

    The barriers keep arrays of the embedding's size from living longer than this function: gathered only now, not with
    the lookup; zeros only now; and summed over `fsdp` before the lookup's gradient is added, not after.
    """
    zero = jnp.zeros((), jnp.float32)
    cast_VD = embedding_VD.astype(x_BTD.dtype)
    x_BTD, embedding_VD, zero = jax.lax.optimization_barrier((x_BTD, cast_VD, zero))
    embedding_VD = gather(embedding_VD, EMBEDDING_AXES)

    def body(carry: Arrays, xs: Arrays) -> tuple[Arrays, jax.Array]:
        total, dembedding_VD = carry
        x_RD, target_R, weight_R = xs
        loss, logits_VR, log_sum_R = chunk_loss(cap, embedding_VD, *xs)
        hit_VR = jnp.arange(len(embedding_VD))[:, None] == target_R
        slope_VR = 1 - jnp.square(logits_VR * (1 / cap))  # of the cap
        d_VR = (jnp.exp(logits_VR - log_sum_R) - hit_VR) * slope_VR * weight_R
        d_VR = d_VR.astype(x_RD.dtype)
        dembedding_VD += jnp.einsum("VR,RD->VD", d_VR, x_RD, preferred_element_type=jnp.float32)
        return (total + loss, dembedding_VD), jnp.einsum("VR,VD->RD", d_VR, embedding_VD)

    start: Arrays = (jnp.zeros((), jnp.float32), jnp.broadcast_to(zero, embedding_VD.shape))
    (total, dembedding_VD), dx_cRD = jax.lax.scan(body, start, cut(chunk, x_BTD, target_BT, weight_BT))
    B, T, D = x_BTD.shape
    dx_BTD = jnp.moveaxis(dx_cRD.reshape(-1, B, chunk, D), 0, 1).reshape(B, -1, D)[:, :T]
    dembedding_VD = scatter(dembedding_VD.astype(reduce_dtype), EMBEDDING_AXES).astype(jnp.float32)
    return total, (dx_BTD, jax.lax.optimization_barrier(dembedding_VD))


def backward(
    cap: float, chunk: int, reduce_dtype: str, grads: Arrays, dtotal: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dx_BTD, dembedding_VD = (grad * dtotal.astype(grad.dtype) for grad in grads)
    return dx_BTD, dembedding_VD, None, None


total.defvjp(forward, backward)


def chunk_loss(
    cap: float, embedding_VD: jax.Array, x_RD: jax.Array, target_R: jax.Array, weight_R: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The chunk's loss, its capped logits_VR and their log_sum_R. V leads: no product needs a transposed [V, R]."""
    logits_VR = jnp.einsum("VD,RD->VR", embedding_VD, x_RD, preferred_element_type=jnp.float32)
    logits_VR = soft_cap(logits_VR, cap)
    log_sum_R = jax.nn.logsumexp(logits_VR, axis=0)
    picked_R = jnp.take_along_axis(logits_VR, target_R[None], axis=0)[0]
    return jnp.sum((log_sum_R - picked_R) * weight_R), logits_VR, log_sum_R


def cut(chunk: int, *arrays: jax.Array) -> Arrays:
    """Each array_BT... as its chunks, array_cR..., padded with 0."""

    def chunks(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % chunk)] + [(0, 0)] * (a.ndim - 2))
        a_BcC = a.reshape(a.shape[0], -1, chunk, *a.shape[2:])
        return jnp.moveaxis(a_BcC, 1, 0).reshape(a_BcC.shape[1], -1, *a.shape[2:])

    return tuple(chunks(a) for a in arrays)
