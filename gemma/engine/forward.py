"""Gemma 2 over a cache of pages: a chunk of tokens of each row, after all that lies in the row's pages.

R rows, T tokens of a row in this chunk, J pages of a row, S = J * page positions that are looked at, D width, N query
heads, K kv heads, G = N/K, H head size, F hidden, V vocabulary.

Layers are unrolled and have arrays of their own: a scan would copy each layer's weights and caches first. The pieces
are those that training has (`gemma.model.transformer`): what defines the model is written once.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma.config import Model
from gemma.model.attention import MASKED, rope, soft_cap
from gemma.model.transformer import geglu, rms_norm

Tree = Any


class Cache(NamedTuple):
    """Keys and values of all sequences: of each layer [K, pages, page, H]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Rows(NamedTuple):
    """What a chunk's rows are. A position without a token is -1: it is computed and goes nowhere."""

    position_RT: Any  # arrays of the host, or of the devices
    local_RJ: Any  # pages of local layers
    first_R: Any  # the page number of the first of them
    global_RJ: Any


@dataclass(frozen=True)
class Shape:
    model: Model
    page: int
    dtype: str
    platform: str


def unstacked(params: Tree, model: Model) -> Tree:
    """The parameters of `gemma.model.transformer` with arrays of each layer's own, local and global in turn."""
    layers = []
    for layer in range(model.layers):
        block = params["pairs"]["local_block" if layer % 2 == 0 else "global_block"]
        at = {name: leaf[layer // 2] for name, leaf in block.items()}
        layers.append(
            {
                "norms_4D": at["norms_P4D"],
                "q_DNH": at["q_PDNH"],
                "k_DKH": at["kv_P2DKH"][0],
                "v_DKH": at["kv_P2DKH"][1],
                "o_NHD": at["o_PNHD"],
                "gate_DF": at["gating_P2DF"][0],
                "up_DF": at["gating_P2DF"][1],
                "down_FD": at["down_PFD"],
            }
        )
    return {"embedding_VD": params["embedding_VD"], "final_norm": params["final_norm"], "layers": layers}


def hidden(shape: Shape, weights: Tree, cache: Cache, tokens_RT: jax.Array, rows: Rows) -> tuple[jax.Array, Cache]:
    """x_RTD after the final norm, and the cache with the chunk's keys and values in it."""
    model, dtype = shape.model, jnp.dtype(shape.dtype)
    x_RTD = weights["embedding_VD"][tokens_RT].astype(dtype) * jnp.asarray(model.width**0.5, dtype)
    keys, values = list(cache.keys), list(cache.values)
    for layer, at in enumerate(weights["layers"]):
        local = layer % 2 == 0
        pre_attention, post_attention, pre_mlp, post_mlp = at["norms_4D"]
        y_RTD = rms_norm(x_RTD, pre_attention, model.norm_eps)
        y_RTD, keys[layer], values[layer] = attention(shape, at, keys[layer], values[layer], y_RTD, rows, local)
        x_RTD = x_RTD + rms_norm(y_RTD, post_attention, model.norm_eps)
        y_RTD = mlp(at, rms_norm(x_RTD, pre_mlp, model.norm_eps))
        x_RTD = x_RTD + rms_norm(y_RTD, post_mlp, model.norm_eps)
    return rms_norm(x_RTD, weights["final_norm"], model.norm_eps), Cache(tuple(keys), tuple(values))


def attention(
    shape: Shape, at: Tree, keys: jax.Array, values: jax.Array, x_RTD: jax.Array, rows: Rows, local: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    model = shape.model
    q_RTNH, k_RTKH, v_RTKH = (project(x_RTD, at[name]) for name in ("q_DNH", "k_DKH", "v_DKH"))
    q_RTNH = rope(q_RTNH, rows.position_RT, model.rope_base, shape.platform) * jnp.asarray(
        model.query_scale, x_RTD.dtype
    )
    k_RTKH = rope(k_RTKH, rows.position_RT, model.rope_base, shape.platform)
    pages_RJ, first_R = (rows.local_RJ, rows.first_R) if local else (rows.global_RJ, jnp.zeros_like(rows.first_R))
    keys = written(keys, k_RTKH, pages_RJ, first_R, rows.position_RT)
    values = written(values, v_RTKH, pages_RJ, first_R, rows.position_RT)
    window = model.window if local else None
    out_RTNH = attend(q_RTNH, keys, values, pages_RJ, first_R, rows.position_RT, window, model.attention_cap)
    R, T, D = x_RTD.shape
    return (out_RTNH.reshape(R * T, -1) @ at["o_NHD"].reshape(-1, D)).reshape(R, T, D), keys, values


def project(x_RTD: jax.Array, weight: jax.Array) -> jax.Array:
    R, T, D = x_RTD.shape
    return (x_RTD.reshape(R * T, D) @ weight.reshape(D, -1)).reshape(R, T, *weight.shape[1:])


def mlp(at: Tree, x_RTD: jax.Array) -> jax.Array:
    R, T, D = x_RTD.shape
    x_RD = x_RTD.reshape(R * T, D)
    return (geglu(x_RD @ at["gate_DF"], x_RD @ at["up_DF"]) @ at["down_FD"]).reshape(R, T, D)


def written(
    cache: jax.Array, new_RTKH: jax.Array, pages_RJ: jax.Array, first_R: jax.Array, position_RT: jax.Array
) -> jax.Array:
    """The cache with each position's keys or values at its place; what has no position, or no page, goes to page 0."""
    page = cache.shape[2]
    index_RT = position_RT // page - first_R[:, None]
    fits = (position_RT >= 0) & (index_RT < pages_RJ.shape[1])
    page_RT = jnp.where(fits, jnp.take_along_axis(pages_RJ, jnp.clip(index_RT, 0, pages_RJ.shape[1] - 1), axis=1), 0)
    return cache.at[:, page_RT, position_RT % page].set(new_RTKH.transpose(2, 0, 1, 3).astype(cache.dtype))


def attend(
    q_RTNH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pages_RJ: jax.Array,
    first_R: jax.Array,
    position_RT: jax.Array,
    window: int | None,
    cap: float,
) -> jax.Array:
    """out_RTNH. A row looks at all positions of its pages; what lies beyond the query, or before its window, is masked.

    By XLA: the pages of each row are gathered, and kv heads are the first axis, so that nothing is transposed.
    """
    R, T, N, H = q_RTNH.shape
    K, _, page, _ = keys.shape
    S = pages_RJ.shape[1] * page
    k_KRSH, v_KRSH = (cache[:, pages_RJ].reshape(K, R, S, H).astype(q_RTNH.dtype) for cache in (keys, values))
    q_KRtH = q_RTNH.reshape(R, T, K, N // K, H).transpose(2, 0, 1, 3, 4).reshape(K, R, T * (N // K), H)
    logits_KRtS = jnp.einsum("KRtH,KRSH->KRtS", q_KRtH, k_KRSH, preferred_element_type=jnp.float32)
    at_RS = first_R[:, None] * page + jnp.arange(S)
    behind_RTS = position_RT[:, :, None] - at_RS[:, None, :]
    seen_RTS = behind_RTS >= 0
    if window is not None:
        seen_RTS &= behind_RTS < window
    seen_RtS = jnp.repeat(seen_RTS, N // K, axis=1)
    logits_KRtS = jnp.where(seen_RtS, soft_cap(logits_KRtS, cap), MASKED)
    weights_KRtS = jax.nn.softmax(logits_KRtS, axis=-1).astype(q_RTNH.dtype)
    out_KRtH = jnp.einsum("KRtS,KRSH->KRtH", weights_KRtS, v_KRSH)
    return out_KRtH.reshape(K, R, T, N // K, H).transpose(1, 2, 0, 3, 4).reshape(R, T, N, H)
