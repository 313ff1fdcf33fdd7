"""Keys and values in pages, and attention to them, by XLA.

A page of keys lies with its positions side by side: products with few queries run along them.

R rows, T tokens of a row in this chunk, J pages of a row, P of them at a time, S their positions, N query heads, K kv
heads, G = N/K, t = T * G, H head size.
"""

import jax
import jax.numpy as jnp

from gemma.config import Model
from gemma.model.attention import MASKED, soft_cap

AXES = (None, "tensor")  # over which mesh axes its arrays are cut
BLOCK_POSITIONS = 128  # of a row, that a chunk of a prompt looks at at a time


def empty(model: Model, count: int, page: int, dtype: jnp.dtype, _: int) -> tuple[jax.Array, ...]:
    """So many pages of a layer: keys [pages, K, H, page] and values [pages, K, page, H]."""
    K, H = model.kv_heads, model.head_size
    return jnp.zeros((count, K, H, page), dtype), jnp.zeros((count, K, page, H), dtype)


def attend(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    pages: tuple[jax.Array, ...],
    table_RJ: jax.Array,
    first_R: jax.Array,
    position_RT: jax.Array,
    window: int | None,
    cap: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """out_RTNH, and a layer's pages with the chunk's own keys and values in them. table_RJ: a row's pages. first_R: the
    number of the first of them. What has no position, or no page, goes to page 0.
    """
    (keys, values), page = pages, pages[1].shape[2]
    page_RT, offset_RT = page_and_offset(table_RJ, first_R, position_RT, page)
    keys = keys.at[page_RT, :, :, offset_RT].set(k_RTKH.astype(keys.dtype))
    values = values.at[page_RT, :, offset_RT].set(v_RTKH.astype(values.dtype))
    return looked_at(q_RTNH, keys, values, table_RJ, first_R, position_RT, window, cap), (keys, values)


def page_and_offset(
    table_RJ: jax.Array, first_R: jax.Array, position_RT: jax.Array, page: int
) -> tuple[jax.Array, jax.Array]:
    """Where a position is kept: its page, and its place there."""
    index_RT, J = position_RT // page - first_R[:, None], table_RJ.shape[1]
    at_RT = jnp.take_along_axis(table_RJ, jnp.clip(index_RT, 0, J - 1), axis=1)
    return jnp.where((position_RT >= 0) & (index_RT < J), at_RT, 0), position_RT % page


def looked_at(
    q_RTNH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table_RJ: jax.Array,
    first_R: jax.Array,
    position_RT: jax.Array,
    window: int | None,
    cap: float,
) -> jax.Array:
    """A row looks at the positions of its pages up to its own; what lies before its window is masked.

    Page by page of all rows, up to the longest, with a softmax that is kept up to date: so a block of keys is in the
    processor's cache when it is multiplied, and what no row has is not read. (All pages gathered at once are two and a
    half times as slow at 32 rows.)
    """
    R, T, N, H = q_RTNH.shape
    (_, K, page, _), J = values.shape, table_RJ.shape[1]
    G, dtype = N // K, q_RTNH.dtype
    P = 1 if T == 1 else min(J, max(1, BLOCK_POSITIONS // page))
    q_RKtH = q_RTNH.reshape(R, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(R, K, T * G, H)
    table_RJ = jnp.pad(table_RJ, ((0, 0), (0, -J % P)))
    position_R1t1 = jnp.repeat(position_RT, G, axis=1)[:, None, :, None]

    def block(number: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most_RKt1, sum_RKt1, out_RKtH = so_far
        pages_RP = jax.lax.dynamic_slice_in_dim(table_RJ, number * P, P, axis=1)
        k_RKHS = keys[pages_RP].astype(dtype).transpose(0, 2, 3, 1, 4).reshape(R, K, H, P * page)
        v_RKSH = values[pages_RP].astype(dtype).transpose(0, 2, 1, 3, 4).reshape(R, K, P * page, H)
        logits_RKtS = jnp.einsum("RKtH,RKHS->RKtS", q_RKtH, k_RKHS, preferred_element_type=jnp.float32)
        at_R11S = ((first_R + number * P) * page)[:, None, None, None] + jnp.arange(P * page)
        behind_R1tS = position_R1t1 - at_R11S
        seen_R1tS = behind_R1tS >= 0
        if window is not None:
            seen_R1tS &= behind_R1tS < window
        logits_RKtS = jnp.where(seen_R1tS, soft_cap(logits_RKtS, cap), MASKED)
        higher_RKt1 = jnp.maximum(most_RKt1, logits_RKtS.max(axis=-1, keepdims=True))
        weight_RKtS, kept_RKt1 = jnp.exp(logits_RKtS - higher_RKt1), jnp.exp(most_RKt1 - higher_RKt1)
        sum_RKt1 = sum_RKt1 * kept_RKt1 + weight_RKtS.sum(axis=-1, keepdims=True)
        more_RKtH = jnp.einsum("RKtS,RKSH->RKtH", weight_RKtS.astype(dtype), v_RKSH, preferred_element_type=jnp.float32)
        return higher_RKt1, sum_RKt1, out_RKtH * kept_RKt1 + more_RKtH

    nothing_RKt1 = jnp.zeros((R, K, T * G, 1), jnp.float32)
    start = (nothing_RKt1 + MASKED, nothing_RKt1, jnp.zeros((R, K, T * G, H), jnp.float32))
    pages_R = jnp.max(position_RT, axis=1) // page + 1 - first_R
    blocks = (jnp.clip(jnp.max(pages_R), 1, J) + P - 1) // P
    _, sum_RKt1, out_RKtH = jax.lax.fori_loop(0, blocks, block, start)
    out_RKtH = (out_RKtH / sum_RKt1).astype(dtype)
    return out_RKtH.reshape(R, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(R, T, N, H)
