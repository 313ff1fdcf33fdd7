"""Keys and values in pages, and attention to them, by XLA.

A page of keys lies with its positions side by side: products with one query run along them.

R rows, T tokens of a row in this chunk, J pages of a row, N query heads, K kv heads, G = N/K, H head size, p positions
of a page.
"""

import jax
import jax.numpy as jnp

from gemma.config import Model
from gemma.model.attention import MASKED, soft_cap


def empty(model: Model, count: int, page: int, dtype: jnp.dtype, _: int) -> tuple[jax.Array, ...]:
    """So many pages of a layer: keys [K, pages, H, page] and values [K, pages, page, H]."""
    K, H = model.kv_heads, model.head_size
    return jnp.zeros((K, count, H, page), dtype), jnp.zeros((K, count, page, H), dtype)


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
    index_RT = position_RT // page - first_R[:, None]
    fits_RT = (position_RT >= 0) & (index_RT < table_RJ.shape[1])
    at_RT = jnp.take_along_axis(table_RJ, jnp.clip(index_RT, 0, table_RJ.shape[1] - 1), axis=1)
    page_RT, offset_RT = jnp.where(fits_RT, at_RT, 0), position_RT % page
    keys = keys.at[:, page_RT, :, offset_RT].set(k_RTKH.astype(keys.dtype))
    values = values.at[:, page_RT, offset_RT].set(v_RTKH.transpose(2, 0, 1, 3).astype(values.dtype))
    return looked_at(q_RTNH, keys, values, table_RJ, first_R, position_RT, window, cap), (keys, values)


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
    """A row looks at all positions of its pages; what lies beyond the query, or before its window, is masked.

    Pages are gathered by one index over heads and pages, so that they come in the order in which they are read
    (by two, XLA copies them once more). Few queries are multiplied and summed, where the products of a matrix with one
    row have no fast form on CPUs.
    """
    R, T, N, H = q_RTNH.shape
    (K, count, page, _), J = values.shape, table_RJ.shape[1]
    G, dtype = N // K, q_RTNH.dtype
    at_KRJ = jnp.arange(K)[:, None, None] * count + table_RJ
    k_KRJHp = keys.reshape(K * count, H, page)[at_KRJ].astype(dtype)
    v_KRJpH = values.reshape(K * count, page, H)[at_KRJ].astype(dtype)
    q_KRtH = q_RTNH.reshape(R, T, K, G, H).transpose(2, 0, 1, 3, 4).reshape(K, R, T * G, H)
    if T == 1:
        products = q_KRtH[:, :, :, None, :, None].astype(jnp.float32) * k_KRJHp[:, :, None].astype(jnp.float32)
        logits_KRtJp = jnp.sum(products, axis=4)
    else:
        logits_KRtJp = jnp.einsum("KRtH,KRJHp->KRtJp", q_KRtH, k_KRJHp, preferred_element_type=jnp.float32)
    at_RJp = (first_R[:, None] * page + jnp.arange(J * page)).reshape(R, J, page)
    behind_RTJp = position_RT[:, :, None, None] - at_RJp[:, None]
    seen_RTJp = behind_RTJp >= 0
    if window is not None:
        seen_RTJp &= behind_RTJp < window
    seen_RtJp = jnp.repeat(seen_RTJp, G, axis=1)
    logits_KRtJp = jnp.where(seen_RtJp, soft_cap(logits_KRtJp, cap), MASKED)
    weights_KRtJp = jax.nn.softmax(logits_KRtJp, axis=(3, 4)).astype(dtype)
    out_KRtH = jnp.einsum("KRtJp,KRJpH->KRtH", weights_KRtJp, v_KRJpH)
    return out_KRtH.reshape(K, R, T, G, H).transpose(1, 2, 0, 3, 4).reshape(R, T, N, H)
