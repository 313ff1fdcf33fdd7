"""Gemma 2 (arXiv:2408.00118) in Flax NNX.

B batch, T time, D width, N query heads, K kv heads, H head size, F hidden, V vocabulary, P layer pairs.

Layers alternate local and global attention, so they are stored and scanned as P pairs: every weight of a block
has a leading P. Each parameter is declared once, with its logical axes; `gemma.model.sharding.RULES` places them.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from gemma.config import Model
from gemma.model.attention import attend, rope, soft_cap
from gemma.model.attention_cpu import SAVED
from gemma.model.sharding import EMBEDDING_AXES, gather, gather_weight, scatter

# What the backward pass finds again, by the names given below; the rest it makes again. The wide products, gate and up,
# take more memory than all others.
NARROW = ("rms", "heads", SAVED, "attention_out", "mlp_out")
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(*NARROW, "wide"),
    "narrow": jax.checkpoint_policies.save_only_these_names(*NARROW),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def weight(rngs: nnx.Rngs, fan_in: int, **dims: int) -> nnx.Param:
    """A float32 matrix drawn from N(0, 1/fan_in); dims maps its logical axes to sizes, in order."""
    value = jax.random.normal(rngs.params(), tuple(dims.values()), jnp.float32) * fan_in**-0.5
    return nnx.Param(value, axes=tuple(dims))


def scale(**dims: int) -> nnx.Param:
    """A norm's scale; the norm multiplies by (1 + scale), so it starts at 0."""
    return nnx.Param(jnp.zeros(tuple(dims.values()), jnp.float32), axes=tuple(dims))


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * (1 + scale) over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    x32 = x32 * checkpoint_name(inverse, "rms")
    return (x32 * (1.0 + scale_D.astype(jnp.float32))).astype(x.dtype)


def float32_means_float32(dtype: str) -> AbstractContextManager[Any]:
    """A TPU rounds the factors of a float32 product to bfloat16 unless the precision is asked for."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x[B, T, *inner] @ weight[*inner, *outer]: [B, T, *outer].

    One matrix product over B*T rows: contracted over two axes, as the gradient of the weight would be, XLA on CPU
    first transposes the larger operand.
    """
    B, T, *inner = x.shape
    outer = weight.shape[len(inner) :]
    rows = math.prod(inner)
    return (x.reshape(B * T, rows) @ weight.reshape(rows, -1)).reshape(B, T, *outer)


@jax.custom_vjp
def geglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """GELU of the gate, by tanh, times up."""
    return jax.nn.gelu(gate_BTF, approximate=True) * up_BTF


def geglu_forward(gate_BTF: jax.Array, up_BTF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return geglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def geglu_backward(residuals: tuple[jax.Array, jax.Array], dh_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By hand for the barrier: both gradients leave the product that makes dh, which is never written itself."""
    _, vjp = jax.vjp(lambda gate, up: jax.nn.gelu(gate, approximate=True) * up, *residuals)
    return jax.lax.optimization_barrier(vjp(dh_BTF))


geglu.defvjp(geglu_forward, geglu_backward)


def width_contiguous(x_BTD: jax.Array) -> jax.Array:
    """x, a token's numbers side by side in memory. Left to itself the TPU compiler lays the forward pass out by time,
    as the logits' product likes it, and the backward pass by width: all that is kept between them is copied.
    """
    return with_layout_constraint(x_BTD, Layout((0, 1, 2)))


class Block(nnx.Module):
    """One transformer block, for all P pairs at once; `__call__` expects the weights of a single pair.

    Keys and values, gate and up, and the four norms each share an array, as in the released checkpoints for the
    first two: on a mesh every array costs a collective a step.
    """

    def __init__(self, config: Model, *, local: bool, platform: str, reduce_dtype: str, rngs: nnx.Rngs):
        c, P = config, config.layers // 2
        self.config, self.platform, self.reduce_dtype = config, platform, reduce_dtype
        self.window = config.window if local else None
        D, N, K, H, F = c.width, c.heads, c.kv_heads, c.head_size, c.hidden
        # Before and after attention, before and after the MLP.       On the mesh, by gemma.model.sharding.RULES:
        self.norms_P4D = scale(pairs=P, which=4, norm=D)  # .............. [P, 4, D]
        self.q_PDNH = weight(rngs, D, pairs=P, width=D, heads=N, head=H)  # [P, D/fsdp, N/tensor, H]
        self.kv_P2DKH = weight(rngs, D, pairs=P, which=2, width=D, kv_heads=K, head=H)  # [P, 2, D/fsdp, K/tensor, H]
        self.o_PNHD = weight(rngs, N * H, pairs=P, heads=N, head=H, width=D)  # [P, N/tensor, H, D/fsdp]
        self.gating_P2DF = weight(rngs, D, pairs=P, which=2, width=D, hidden=F)  # [P, 2, D/fsdp, F/tensor]
        self.down_PFD = weight(rngs, F, pairs=P, hidden=F, width=D)  # [P, F/tensor, D/fsdp]

    def __call__(self, x_BTD: jax.Array, segment_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
        norm = partial(rms_norm, eps=self.config.norm_eps)
        pre_attention, post_attention, pre_mlp, post_mlp = self.norms_P4D[...]
        y_BTD = self.attention(norm(x_BTD, pre_attention), segment_BT, position_BT)
        y_BTD = checkpoint_name(y_BTD, "attention_out")
        x_BTD = x_BTD + norm(y_BTD, post_attention)
        y_BTD = checkpoint_name(self.mlp(norm(x_BTD, pre_mlp)), "mlp_out")
        return x_BTD + norm(y_BTD, post_mlp)

    def attention(self, x_BTD: jax.Array, segment_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
        c, dtype = self.config, x_BTD.dtype
        q_BTNH = project(x_BTD, self.gathered(self.q_PDNH, dtype))
        k_BTKH, v_BTKH = (project(x_BTD, w_DKH) for w_DKH in self.both(self.kv_P2DKH, dtype))
        q_BTNH = rope(q_BTNH, position_BT, c.rope_base, self.platform) * jnp.asarray(c.query_scale, dtype)
        k_BTKH = rope(k_BTKH, position_BT, c.rope_base, self.platform)
        q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, "heads") for x in (q_BTNH, k_BTKH, v_BTKH))
        out_BTNH = attend(
            q_BTNH, k_BTKH, v_BTKH, segment_BT, window=self.window, cap=c.attention_cap, platform=self.platform
        )
        return project(out_BTNH, self.gathered(self.o_PNHD, dtype))

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        weights = self.both(self.gating_P2DF, dtype)
        gate_BTF, up_BTF = (checkpoint_name(project(x_BTD, w_DF), "wide") for w_DF in weights)
        return project(geglu(gate_BTF, up_BTF), self.gathered(self.down_PFD, dtype))

    def gathered(self, param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
        """A weight in the compute dtype, whole along `fsdp`: an all-gather; backward, a reduce-scatter."""
        axes = param.axes[-param.ndim :]  # inside the scan the leading `pairs` is gone
        return gather_weight(param[...], axes, dtype.name, self.reduce_dtype)

    def both(self, param: nnx.Param, dtype: jnp.dtype) -> Iterable[jax.Array]:
        """The two weights that share an array. On TPU they are gathered one by one: the gradient of both would be put
        together of two in HBM before it is scattered. Elsewhere together: there a collective costs more than that.
        """
        if self.platform != "tpu":
            return self.gathered(param, dtype)
        axes = param.axes[1 - param.ndim :]
        return [gather_weight(half, axes, dtype.name, self.reduce_dtype) for half in param[...]]


class Pair(nnx.Module):
    """A local block, then a global one."""

    def __init__(self, config: Model, *, platform: str, reduce_dtype: str, rngs: nnx.Rngs):
        self.platform = platform
        self.local_block = Block(config, local=True, platform=platform, reduce_dtype=reduce_dtype, rngs=rngs)
        self.global_block = Block(config, local=False, platform=platform, reduce_dtype=reduce_dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, segment_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
        x_BTD = self.local_block(x_BTD, segment_BT, position_BT)
        return self.global_block(x_BTD, segment_BT, position_BT)


class Gemma(nnx.Module):
    """The whole model. `model(tokens_BT)` gives float32 logits_BTV; training takes `hidden` and the chunked loss.

    dtype: of the computation; the parameters are float32. reduce_dtype: in which gradients are summed over `fsdp`;
    `dtype` where it is not given. platform: of the devices it will run on, where they are not this process's own
    (`gemma.model.attention.attend`).
    """

    def __init__(
        self,
        config: Model,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        reduce_dtype: str | None = None,
        remat: str = "none",
        platform: str | None = None,
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        self.reduce_dtype = reduce_dtype or dtype
        self.embedding_VD = weight(rngs, config.width, vocab=config.vocab, width=config.width)
        assert self.embedding_VD.axes == EMBEDDING_AXES
        platform = platform or jax.default_backend()
        self.pairs = Pair(config, platform=platform, reduce_dtype=self.reduce_dtype, rngs=rngs)
        self.final_norm = scale(norm=config.width)

    def __call__(self, tokens_BT: jax.Array, segment_BT: jax.Array | None = None) -> jax.Array:
        if segment_BT is None:
            segment_BT = jnp.zeros_like(tokens_BT)
        with float32_means_float32(self.dtype):
            x_BTD, embedding_VD = self.hidden(tokens_BT, segment_BT)
            return logits(x_BTD, embedding_VD, self.config.final_cap)

    def hidden(self, tokens_BT: jax.Array, segment_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x_BTD after the final norm, in the compute dtype, and the tied embedding_VD that makes logits of it, float32:
        the gradients of its two uses are added in float32.

        The embedding is still cut along `fsdp`: the loss gathers it by itself, and cuts its gradient before that of
        the layers is made, which otherwise would all happen beside two more arrays of the embedding's size.
        """
        dtype = jnp.dtype(self.dtype)
        embedding_VD = self.embedding_VD[...]
        # Rounded to the compute dtype as in the released code: sqrt(D) in bfloat16 is not sqrt(D).
        x_BTD = lookup(self.dtype, self.reduce_dtype, embedding_VD, tokens_BT) * jnp.asarray(
            self.config.width**0.5, dtype
        )
        position_BT = positions(segment_BT)
        graph, weights = nnx.split(self.pairs)

        def body(x_BTD: jax.Array, pair: nnx.State) -> tuple[jax.Array, None]:
            if self.pairs.platform == "tpu":
                x_BTD = width_contiguous(x_BTD)
            return nnx.merge(graph, pair)(x_BTD, segment_BT, position_BT), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        x_BTD, _ = jax.lax.scan(body, x_BTD, weights)
        return rms_norm(x_BTD, self.final_norm[...], self.config.norm_eps), embedding_VD


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lookup(dtype: str, reduce_dtype: str, embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """x_BTD in `dtype`: the tokens' rows of the float32 embedding, which comes cut along `fsdp` where the program is
    manual over it.
    """
    return gather(embedding_VD.astype(dtype), EMBEDDING_AXES)[tokens_BT]


def lookup_forward(
    dtype: str, reduce_dtype: str, embedding_VD: jax.Array, tokens_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return lookup(dtype, reduce_dtype, embedding_VD, tokens_BT), (tokens_BT, embedding_VD.shape[0])


def lookup_backward(
    dtype: str, reduce_dtype: str, residuals: tuple[jax.Array, int], dx_BTD: jax.Array
) -> tuple[jax.Array, None]:
    """By hand for the barrier: the zeros, as large as the embedding, are not to be there before dx is."""
    tokens_BT, V = residuals
    dx_BTD, zero = jax.lax.optimization_barrier((dx_BTD, jnp.zeros((), jnp.float32)))
    dembedding_VD = sum_by_token(tokens_BT, dx_BTD, V, zero).astype(reduce_dtype)
    return scatter(dembedding_VD, EMBEDDING_AXES).astype(jnp.float32), None


lookup.defvjp(lookup_forward, lookup_backward)


def sum_by_token(tokens_BT: jax.Array, dx_BTD: jax.Array, V: int, zero: jax.Array) -> jax.Array:
    """dembedding_VD: the sum of dx over the places of each token, taken in float32 and rounded to dx's dtype once.

    In bfloat16 a sum stands still once it is 256 times an addend, and tokens occur thousands of times. A float32 array
    of the embedding's size would be gigabytes: where the vocabulary is larger than the batch, the sums are those of the
    distinct tokens only, and they are rounded before they are put in their rows.
    """
    D = dx_BTD.shape[-1]
    token_R, dx_RD = tokens_BT.ravel(), dx_BTD.reshape(-1, D).astype(jnp.float32)
    if len(token_R) >= V or dx_BTD.dtype == jnp.float32:
        return jnp.broadcast_to(zero, (V, D)).at[token_R].add(dx_RD).astype(dx_BTD.dtype)
    distinct_R, at_R = jnp.unique(token_R, return_inverse=True, size=len(token_R), fill_value=V)
    sums_RD = jnp.zeros_like(dx_RD).at[at_R].add(dx_RD)
    rows_VD = jnp.broadcast_to(zero.astype(dx_BTD.dtype), (V, D))
    return rows_VD.at[distinct_R].set(sums_RD.astype(dx_BTD.dtype), mode="drop", indices_are_sorted=True)


def logits(x_BTD: jax.Array, embedding_VD: jax.Array, cap: float) -> jax.Array:
    """Capped float32 logits_BTV from the tied embedding."""
    embedding_VD = embedding_VD.astype(x_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD, preferred_element_type=jnp.float32)
    return soft_cap(logits_BTV, cap)


def positions(segment_BT: jax.Array) -> jax.Array:
    """Time since the start of each token's document; segments are contiguous."""
    time_T = jnp.arange(segment_BT.shape[1])
    starts_BT = jnp.concatenate(
        [jnp.ones_like(segment_BT[:, :1], bool), segment_BT[:, 1:] != segment_BT[:, :-1]], axis=1
    )
    return time_T - jax.lax.cummax(jnp.where(starts_BT, time_T, 0), axis=1)
