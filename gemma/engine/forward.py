"""Gemma 2 over a cache of pages: a chunk of tokens of each row, after all that lies in the row's pages.

R rows, T tokens of a row in this chunk, J pages of a row, S = J * page positions that are looked at, D width, N query
heads, K kv heads, G = N/K, H head size, F hidden, V vocabulary.

Layers are unrolled and have arrays of their own: a scan would copy each layer's weights and caches first. The pieces
are those that training has (`gemma.model.transformer`): what defines the model is written once.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma.config import Model
from gemma.model.attention import MASKED, rope, soft_cap
from gemma.model.transformer import geglu, rms_norm

Tree = Any
FEWEST_ROWS = 8


class Cache(NamedTuple):
    """Keys and values of all sequences, of each layer. A page of keys lies with its positions side by side: products
    with one query run along them.
    """

    keys: tuple[jax.Array, ...]  # [K, pages, H, page]
    values: tuple[jax.Array, ...]  # [K, pages, page, H]


class Rows(NamedTuple):
    """What a chunk's rows are. A position without a token is -1: it is computed and goes nowhere."""

    position_RT: Any  # arrays of the host, or of the devices
    local_RJ: Any  # pages of local layers
    first_R: Any  # the page number of the first of them
    global_RJ: Any


@dataclass(frozen=True)
class Shape:
    """What the programs are built from."""

    model: Model
    dtype: str  # of what is computed and kept; the weights' may be another
    mesh: jax.sharding.Mesh

    @property
    def platform(self) -> str:
        """Of the devices that it is compiled for."""
        return str(self.mesh.devices.flat[0].platform)


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
    over_pages = partial(attend_pages, window=model.window if local else None, cap=model.attention_cap)
    if shape.mesh.shape["tensor"] > 1:  # each device has its own heads, and their pages
        everywhere, heads, cut = P(), P(None, None, "tensor"), P("tensor")
        places = (heads, heads, heads, cut, cut, everywhere, everywhere, everywhere)
        over_pages = jax.shard_map(
            over_pages, mesh=shape.mesh, in_specs=places, out_specs=(heads, cut, cut), check_vma=False
        )
    out_RTNH, keys, values = over_pages(q_RTNH, k_RTKH, v_RTKH, keys, values, pages_RJ, first_R, rows.position_RT)
    R, T, D = x_RTD.shape
    return product(out_RTNH.reshape(R * T, -1), at["o_NHD"].reshape(-1, D)).reshape(R, T, D), keys, values


def project(x_RTD: jax.Array, weight: jax.Array) -> jax.Array:
    R, T, D = x_RTD.shape
    return product(x_RTD.reshape(R * T, D), weight.reshape(D, -1)).reshape(R, T, *weight.shape[1:])


def mlp(at: Tree, x_RTD: jax.Array) -> jax.Array:
    R, T, D = x_RTD.shape
    x_RD = x_RTD.reshape(R * T, D)
    return product(geglu(product(x_RD, at["gate_DF"]), product(x_RD, at["up_DF"])), at["down_FD"]).reshape(R, T, D)


def product(x_RD: jax.Array, weight_DE: jax.Array) -> jax.Array:
    """x @ weight, in x's dtype. Weights of another dtype are multiplied in theirs, and summed in x's: on CPUs, where
    such products of a few rows are slow and those of FEWEST_ROWS are not.
    """
    if x_RD.dtype == weight_DE.dtype:
        return x_RD @ weight_DE
    R = len(x_RD)
    rounded = jnp.pad(x_RD.astype(weight_DE.dtype), ((0, max(0, FEWEST_ROWS - R)), (0, 0)))
    return jnp.dot(rounded, weight_DE, preferred_element_type=x_RD.dtype)[:R]


def attend_pages(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pages_RJ: jax.Array,
    first_R: jax.Array,
    position_RT: jax.Array,
    window: int | None,
    cap: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """out_RTNH, and keys and values with the chunk's own written to its pages. first_R: the number of a row's first
    page. What has no position, or no page, goes to page 0.
    """
    page = values.shape[2]
    index_RT = position_RT // page - first_R[:, None]
    fits_RT = (position_RT >= 0) & (index_RT < pages_RJ.shape[1])
    at_RT = jnp.take_along_axis(pages_RJ, jnp.clip(index_RT, 0, pages_RJ.shape[1] - 1), axis=1)
    page_RT, offset_RT = jnp.where(fits_RT, at_RT, 0), position_RT % page
    keys = keys.at[:, page_RT, :, offset_RT].set(k_RTKH.astype(keys.dtype))
    values = values.at[:, page_RT, offset_RT].set(v_RTKH.transpose(2, 0, 1, 3).astype(values.dtype))
    return attend(q_RTNH, keys, values, pages_RJ, first_R, position_RT, window, cap), keys, values


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
    """A row looks at all positions of its pages; what lies beyond the query, or before its window, is masked.

    By XLA. Pages are gathered by one index over heads and pages, so that they come in the order in which they are read
    (by two, XLA copies them once more). Few queries are multiplied and summed, where the products of a matrix with one
    row have no fast form on CPUs.
    """
    R, T, N, H = q_RTNH.shape
    (K, count, page, _), J = values.shape, pages_RJ.shape[1]
    G, dtype = N // K, q_RTNH.dtype
    at_KRJ = jnp.arange(K)[:, None, None] * count + pages_RJ
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
