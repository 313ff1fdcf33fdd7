"""Gemma 2 over a cache of pages: a chunk of tokens of each row, after all that lies in the row's pages.

R rows, T tokens of a row in this chunk, J pages of a row, D width, N query heads, K kv heads, H head size, F hidden,
V vocabulary.

Layers are unrolled and have arrays of their own: a scan would copy each layer's weights and caches first. The pieces
are those that training has (`gemma.model.transformer`): what defines the model is written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma.config import Model
from gemma.engine import pages_xla
from gemma.model.attention import rope, soft_cap
from gemma.model.sharding import EMBEDDING_AXES, sharding
from gemma.model.transformer import geglu, logits, rms_norm

Tree = Any
NORMS = ("final_norm", "norms_P4D")  # a few kilobytes: float32, always
FEWEST_ROWS = 8


Cache = tuple[tuple[jax.Array, ...], ...]  # keys and values of all sequences: of each layer what `pages_*` hold


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
    int8: bool = False  # weights are held as `Int8`

    @property
    def platform(self) -> str:
        """Of the devices that it is compiled for."""
        return str(self.mesh.devices.flat[0].platform)


class Int8(NamedTuple):
    """A weight in eight bits: value * scale, with a scale for each output (of the embedding, for each row)."""

    value: Any  # int8
    scale: Any  # float32


LAYER_AXES = {  # logical axes, as `gemma.model.sharding` places them; heads lie flat: E = N * H or K * H
    "norms_4D": ("which", "norm"),
    "q_DE": ("width", "heads"),
    "k_DE": ("width", "kv_heads"),
    "v_DE": ("width", "kv_heads"),
    "o_ED": ("heads", "width"),
    "gate_DF": ("width", "hidden"),
    "up_DF": ("width", "hidden"),
    "down_FD": ("hidden", "width"),
}


def unstacked(params: Tree, shape: Shape) -> Tree:
    """The parameters of `gemma.model.transformer` with arrays of each layer's own, local and global in turn.

    Heads are laid flat once: on TPU an array with heads is in another order, and each step would copy it.
    """
    layers, D = [], shape.model.width
    for layer in range(shape.model.layers):
        block = params["pairs"]["local_block" if layer % 2 == 0 else "global_block"]
        at = {name: leaf[layer // 2] for name, leaf in block.items()}
        layers.append(
            {
                "norms_4D": at["norms_P4D"],
                "q_DE": at["q_PDNH"].reshape(D, -1),
                "k_DE": at["kv_P2DKH"][0].reshape(D, -1),
                "v_DE": at["kv_P2DKH"][1].reshape(D, -1),
                "o_ED": at["o_PNHD"].reshape(-1, D),
                "gate_DF": at["gating_P2DF"][0],
                "up_DF": at["gating_P2DF"][1],
                "down_FD": at["down_PFD"],
            }
        )
    embedding_VD, final_norm = params["embedding_VD"], params["final_norm"]
    if shape.int8:
        embedding_VD = in_int8(embedding_VD, axis=1)
        layers = [{n: x if n == "norms_4D" else in_int8(x, axis=0) for n, x in layer.items()} for layer in layers]
    return {"embedding_VD": embedding_VD, "final_norm": final_norm, "layers": layers}


def in_int8(weight: jax.Array, axis: int) -> Int8:
    """Rounded to the nearest of 255 steps. axis: over which one scale holds."""
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=axis) / 127
    steps = weight / jnp.expand_dims(jnp.where(scale == 0, 1, scale), axis)
    return Int8(jnp.round(steps).astype(jnp.int8), scale)


def weight_places(shape: Shape) -> Tree:
    """Where the unstacked weights lie."""
    at = partial(sharding, shape.mesh)
    layer: dict[str, Any] = {name: at(axes) for name, axes in LAYER_AXES.items()}
    embedding_VD: Any = at(EMBEDDING_AXES)
    if shape.int8:
        embedding_VD = Int8(embedding_VD, at(EMBEDDING_AXES[:1]))
        layer |= {n: Int8(layer[n], at(axes[1:])) for n, axes in LAYER_AXES.items() if n != "norms_4D"}
    return {
        "embedding_VD": embedding_VD,
        "final_norm": at(("norm",)),
        "layers": [layer] * shape.model.layers,
    }


# q_RTNH, k_RTKH and v_RTKH of a layer, turned and scaled: out_RTNH. It keeps what it wants of them.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def hidden(shape: Shape, weights: Tree, tokens_RT: jax.Array, position_RT: jax.Array, attend: Attend) -> jax.Array:
    """x_RTD after the final norm. attend: to what came before and to the tokens themselves."""
    model, dtype = shape.model, jnp.dtype(shape.dtype)
    x_RTD = embedded(weights["embedding_VD"], tokens_RT).astype(dtype) * jnp.asarray(model.width**0.5, dtype)
    for layer, at in enumerate(weights["layers"]):
        pre_attention, post_attention, pre_mlp, post_mlp = at["norms_4D"]
        y_RTD = rms_norm(x_RTD, pre_attention, model.norm_eps)
        y_RTD = attention(shape, at, y_RTD, position_RT, partial(attend, layer))
        x_RTD = x_RTD + rms_norm(y_RTD, post_attention, model.norm_eps)
        y_RTD = mlp(at, rms_norm(x_RTD, pre_mlp, model.norm_eps))
        x_RTD = x_RTD + rms_norm(y_RTD, post_mlp, model.norm_eps)
    return rms_norm(x_RTD, weights["final_norm"], model.norm_eps)


def attention(shape: Shape, at: Tree, x_RTD: jax.Array, position_RT: jax.Array, attend: Any) -> jax.Array:
    model = shape.model
    q_RTNH, k_RTKH, v_RTKH = (project(x_RTD, at[name], model.head_size) for name in ("q_DE", "k_DE", "v_DE"))
    q_RTNH = rope(q_RTNH, position_RT, model.rope_base, shape.platform) * jnp.asarray(model.query_scale, x_RTD.dtype)
    k_RTKH = rope(k_RTKH, position_RT, model.rope_base, shape.platform)
    out_RTNH = attend(q_RTNH, k_RTKH, v_RTKH)
    R, T, D = x_RTD.shape
    return product(out_RTNH.reshape(R * T, -1), at["o_ED"]).reshape(R, T, D)


def hidden_over_pages(
    shape: Shape, weights: Tree, cache: Cache, tokens_RT: jax.Array, rows: Rows
) -> tuple[jax.Array, Cache]:
    """x_RTD after the final norm, and the cache with the chunk's keys and values in it."""
    pages = list(cache)

    def attend(layer: int, q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array) -> jax.Array:
        out_RTNH, pages[layer] = over_pages(shape, layer, q_RTNH, k_RTKH, v_RTKH, pages[layer], rows)
        return out_RTNH

    return hidden(shape, weights, tokens_RT, rows.position_RT, attend), tuple(pages)


def over_pages(
    shape: Shape,
    layer: int,
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    pages: tuple[jax.Array, ...],
    rows: Rows,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    model, local, kept = shape.model, layer % 2 == 0, pages_of(shape)
    table_RJ, first_R = (rows.local_RJ, rows.first_R) if local else (rows.global_RJ, jnp.zeros_like(rows.first_R))
    attend = partial(kept.attend, window=model.window if local else None, cap=model.attention_cap)
    everywhere, heads, cut = P(), P(None, None, "tensor"), P(*kept.AXES)
    if shape.mesh.size > 1:  # each device along `tensor` has its own heads, and their pages
        attend = jax.shard_map(
            attend,
            mesh=shape.mesh,
            in_specs=(heads, heads, heads, (cut,) * len(pages), everywhere, everywhere, everywhere),
            out_specs=(heads, (cut,) * len(pages)),
            check_vma=False,
        )
    found: tuple[jax.Array, tuple[jax.Array, ...]] = attend(
        q_RTNH, k_RTKH, v_RTKH, pages, table_RJ, first_R, rows.position_RT
    )
    return found


def pages_of(shape: Shape) -> Any:
    """What keeps keys and values, and attends to them: on TPU by a kernel, which takes heads of 128, 256 and so on."""
    if shape.platform == "tpu" and shape.model.head_size % 128 == 0:
        from gemma.engine import pages_tpu  # Pallas is half a second that no other platform pays

        return pages_tpu
    return pages_xla


def embedded(embedding_VD: Any, tokens_RT: jax.Array) -> jax.Array:
    if isinstance(embedding_VD, Int8):
        return embedding_VD.value[tokens_RT] * embedding_VD.scale[tokens_RT][..., None]
    return embedding_VD[tokens_RT]


def all_logits(shape: Shape, weights: Tree, x_RTD: jax.Array) -> jax.Array:
    """Capped float32 logits_RTV."""
    embedding_VD, cap = weights["embedding_VD"], shape.model.final_cap
    if not isinstance(embedding_VD, Int8):
        return logits(x_RTD, embedding_VD, cap)
    value_VD = embedding_VD.value.astype(x_RTD.dtype)
    plain_RTV = jnp.einsum("RTD,VD->RTV", x_RTD, value_VD, preferred_element_type=jnp.float32)
    return soft_cap(plain_RTV * embedding_VD.scale, cap)


def project(x_RTD: jax.Array, weight_DE: Any, H: int) -> jax.Array:
    """The barrier keeps heads flat up to here: else the TPU compiler turns each weight around, at every step."""
    R, T, D = x_RTD.shape
    return jax.lax.optimization_barrier(product(x_RTD.reshape(R * T, D), weight_DE)).reshape(R, T, -1, H)


def mlp(at: Tree, x_RTD: jax.Array) -> jax.Array:
    R, T, D = x_RTD.shape
    x_RD = x_RTD.reshape(R * T, D)
    return product(geglu(product(x_RD, at["gate_DF"]), product(x_RD, at["up_DF"])), at["down_FD"]).reshape(R, T, D)


def product(x_RD: jax.Array, weight_DE: Any) -> jax.Array:
    """x @ weight, in x's dtype. Weights of another dtype are multiplied in theirs, and summed in x's: on CPUs, where
    such products of a few rows are slow and those of FEWEST_ROWS are not.
    """
    if isinstance(weight_DE, Int8):
        value_DE = weight_DE.value.astype(x_RD.dtype)
        summed_RE = jnp.dot(x_RD, value_DE, preferred_element_type=jnp.float32)
        return (summed_RE * weight_DE.scale).astype(x_RD.dtype)
    if x_RD.dtype == weight_DE.dtype:
        return x_RD @ weight_DE
    R = len(x_RD)
    rounded = jnp.pad(x_RD.astype(weight_DE.dtype), ((0, max(0, FEWEST_ROWS - R)), (0, 0)))
    return jnp.dot(rounded, weight_DE, preferred_element_type=x_RD.dtype)[:R]
