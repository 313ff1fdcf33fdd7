"""Attention in XLA that skips what the mask hides: queries in blocks, each against the keys it may see.

B batch, T time, t the queries of a block, s the keys it may see, N query heads, K kv heads, G = N/K, H head size,
R = G*t, the rows of a block: all queries that read one kv head.

The backward pass keeps only out and the sums of the softmax and makes the logits again, keys first, so that no
[s, R] array is ever transposed. The cap bounds the logits, so the softmax needs no running maximum.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # names out and the softmax's sums for rematerialisation policies
LARGEST_CAP = 60.0  # exp of it, summed over 1e6 keys, is far inside float32
BLOCKS = 16  # at most: each is code of its own
Residuals = tuple[jax.Array, ...]


def blocks(T: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) along time: a block's keys begin with the first that its first query sees."""
    side = max(64, -(-T // BLOCKS))
    for start in range(0, T, side):
        stop = min(start + side, T)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first // side * side, stop)


def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array, *, window: int | None, cap: float
) -> jax.Array:
    """out_BTNH, as `gemma.model.attention.plain`. cap at most LARGEST_CAP."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    out_BKGTH = by_blocks(window, cap, q_BKGTH, k_BKTH, v_BKTH, segment_BT)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_blocks(
    window: int | None, cap: float, q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_BT: jax.Array
) -> jax.Array:
    return forward(window, cap, q_BKGTH, k_BKTH, v_BKTH, segment_BT)[0]


def forward(
    window: int | None, cap: float, q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_BT: jax.Array
) -> tuple[jax.Array, Residuals]:
    outs, sums = [], []
    for queries, keys in blocks(segment_BT.shape[1], window):
        q_BKRH, k_BKsH, v_BKsH = rows(q_BKGTH, queries), k_BKTH[:, :, keys], v_BKTH[:, :, keys]
        logits_BKRs = jnp.einsum("BKRH,BKsH->BKRs", q_BKRH, k_BKsH, preferred_element_type=jnp.float32)
        seen_BRs = visible(segment_BT, queries, keys, window, q_BKGTH.shape[2])
        e_BKRs = jnp.where(seen_BRs[:, None], jnp.exp(cap * jnp.tanh(logits_BKRs * (1 / cap))), 0.0)
        sum_BKR = jnp.sum(e_BKRs, axis=-1)
        out_BKRH = jnp.einsum(
            "BKRs,BKsH->BKRH", e_BKRs.astype(v_BKTH.dtype), v_BKsH, preferred_element_type=jnp.float32
        )
        outs.append(unrows(out_BKRH / sum_BKR[..., None], q_BKGTH.shape[2]).astype(q_BKGTH.dtype))
        sums.append(sum_BKR)
    out_BKGTH = checkpoint_name(jnp.concatenate(outs, axis=3), SAVED)
    kept = tuple(checkpoint_name(sum_BKR, SAVED) for sum_BKR in sums)
    return out_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, segment_BT, out_BKGTH, *kept)


def backward(
    window: int | None, cap: float, residuals: Residuals, dout_BKGTH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BKGTH, k_BKTH, v_BKTH, segment_BT, out_BKGTH, *sums = residuals
    G, dtype = q_BKGTH.shape[2], q_BKGTH.dtype
    dk_BKTH, dv_BKTH = jnp.zeros(k_BKTH.shape, jnp.float32), jnp.zeros(v_BKTH.shape, jnp.float32)
    dqs = []
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    for (queries, keys), sum_BKR in zip(blocks(segment_BT.shape[1], window), sums, strict=True):
        q_BKRH, k_BKsH, v_BKsH = rows(q_BKGTH, queries), k_BKTH[:, :, keys], v_BKTH[:, :, keys]
        dout_BKRH, out_BKRH = rows(dout_BKGTH, queries), rows(out_BKGTH, queries)
        logits_BKsR = dot("BKsH,BKRH->BKsR", k_BKsH, q_BKRH)
        tanh_BKsR = jnp.tanh(logits_BKsR * (1 / cap))
        seen_BsR = visible(segment_BT, queries, keys, window, G).swapaxes(1, 2)
        weights_BKsR = jnp.where(seen_BsR[:, None], jnp.exp(cap * tanh_BKsR), 0.0) / sum_BKR[:, :, None]
        mean_BKR = jnp.sum(dout_BKRH.astype(jnp.float32) * out_BKRH.astype(jnp.float32), axis=-1)
        dweights_BKsR = dot("BKsH,BKRH->BKsR", v_BKsH, dout_BKRH)
        dlogits_BKsR = weights_BKsR * (dweights_BKsR - mean_BKR[:, :, None]) * (1 - tanh_BKsR * tanh_BKsR)
        dlogits_BKsR = dlogits_BKsR.astype(dtype)
        dv_BKTH = dv_BKTH.at[:, :, keys].add(dot("BKsR,BKRH->BKsH", weights_BKsR.astype(dtype), dout_BKRH))
        dk_BKTH = dk_BKTH.at[:, :, keys].add(dot("BKsR,BKRH->BKsH", dlogits_BKsR, q_BKRH))
        dq_BKHR = dot("BKsH,BKsR->BKHR", k_BKsH, dlogits_BKsR)
        dqs.append(unrows(dq_BKHR.swapaxes(2, 3), G).astype(dtype))
    return jnp.concatenate(dqs, axis=3), dk_BKTH.astype(k_BKTH.dtype), dv_BKTH.astype(v_BKTH.dtype), None


by_blocks.defvjp(forward, backward)


def rows(x_BKGTH: jax.Array, queries: slice) -> jax.Array:
    """x_BKRH of a block: the heads of a group one after the other."""
    x_BKGtH = x_BKGTH[:, :, :, queries]
    B, K, G, t, H = x_BKGtH.shape
    return x_BKGtH.reshape(B, K, G * t, H)


def unrows(x_BKRH: jax.Array, G: int) -> jax.Array:
    B, K, R, H = x_BKRH.shape
    return x_BKRH.reshape(B, K, G, R // G, H)


def visible(segment_BT: jax.Array, queries: slice, keys: slice, window: int | None, G: int) -> jax.Array:
    """mask_BRs of a block: the rule of `gemma.model.attention.visible`."""
    distance_ts = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None, :]
    mask_ts = distance_ts >= 0
    if window is not None:
        mask_ts &= distance_ts < window
    mask_Bts = mask_ts & (segment_BT[:, queries, None] == segment_BT[:, None, keys])
    return jnp.concatenate([mask_Bts] * G, axis=1)
