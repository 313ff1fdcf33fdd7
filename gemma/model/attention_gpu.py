"""Attention on NVIDIA Hopper: tokamax's flash kernels (Pallas, Mosaic GPU), with the cap inside, forward and backward.

B batch, T time, N query heads, K kv heads, H head size. Queries and keys are one sequence here, so keys have T too.

Unmeasured, and never run on a GPU: compiled to SASS for an H100 that was not there, and interpreted on a CPU
(docs/gpu.md, tests/test_hopper.py). Without the extra `gpu`, and wherever `serves` says no, XLA computes attention
(`attention_cpu`). Other maintained kernels lack what Gemma 2 needs: cuDNN's and JAX's own
have no cap, tokamax's Triton kernel has none in its backward pass.
"""

from functools import cache, partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma.model.attention_cpu import LARGEST_CAP, SAVED
from gemma.model.sharding import by_heads

TOKAMAX = "0.0.12"  # exactly: its masks by first key are reached by names it does not promise to keep
HOPPER = "9.0"  # compute capability; the kernels differ by it
HEAD_SIZES = (128, 256)
TILE = 128  # queries of a block: time is padded to a multiple
Residuals = tuple[jax.Array, ...]


@cache
def available() -> bool:
    """Whether tokamax is there, in the version that this file was written against, and every device is a Hopper."""
    try:
        version = metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        return False
    return version == TOKAMAX and all(getattr(d, "compute_capability", None) == HOPPER for d in jax.local_devices())


def serves(q_BTNH: jax.Array | jax.ShapeDtypeStruct, cap: float) -> bool:
    """Whether `attend` may be asked; float32 is not for these kernels."""
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    return half and q_BTNH.shape[-1] in HEAD_SIZES and cap <= LARGEST_CAP and available()


def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array, *, window: int | None, cap: float
) -> jax.Array:
    """out_BTNH, as `gemma.model.attention.plain`, where every document's tokens are contiguous."""

    def local(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array) -> jax.Array:
        T = q_BTNH.shape[1]
        added = [(0, 0), (0, -T % TILE)]  # the causal mask hides it
        qkv = [jnp.pad(x, [*added, (0, 0), (0, 0)]) for x in (q_BTNH, k_BTKH, v_BTKH)]
        first_BT = first_seen(jnp.pad(segment_BT, added, mode="edge"), window)
        return flash(cap, *qkv, first_BT)[:, :T]

    return by_heads(local)(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def first_seen(segment_BT: jax.Array, window: int | None) -> jax.Array:
    """first_BT: query t sees keys first[t] to t. That is `attention.visible` where documents are contiguous."""
    time_T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)
    starts_BT = jnp.diff(segment_BT, axis=1, prepend=segment_BT[:, :1]) != 0
    first_BT = jax.lax.cummax(jnp.where(starts_BT, time_T, 0), axis=1)
    return first_BT if window is None else jnp.maximum(first_BT, time_T - window + 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(cap: float, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array) -> jax.Array:
    """out_BTNH. A custom gradient of our own, so that rematerialisation policies can name what the kernel keeps."""
    return forward(cap, q_BTNH, k_BTKH, v_BTKH, first_BT)[0]


def forward(
    cap: float, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array
) -> tuple[jax.Array, Residuals]:
    run, asked = kernel(cap, q_BTNH, k_BTKH, v_BTKH, first_BT)
    out_BTNH, (largest_BNT, sum_BNT) = run(q_BTNH, k_BTKH, v_BTKH, **asked, return_residuals=True)
    kept = [checkpoint_name(x, SAVED) for x in (out_BTNH, largest_BNT, sum_BNT)]
    return kept[0], (q_BTNH, k_BTKH, v_BTKH, first_BT, *kept)


def backward(cap: float, residuals: Residuals, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, first_BT, out_BTNH, *softmax = residuals
    run, asked = kernel(cap, q_BTNH, k_BTKH, v_BTKH, first_BT)
    grads = run.vjp(tuple(softmax), out_BTNH, dout_BTNH, q_BTNH, k_BTKH, v_BTKH, **asked)
    return grads["q"], grads["k"], grads["v"], None


flash.defvjp(forward, backward)


def kernel(
    cap: float, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array
) -> tuple[Any, dict[str, Any]]:
    """tokamax's operation and what it is asked, its defaults filled in. Blocks are those its own heuristics choose for
    an H100's 227 KiB of shared memory. At head size 256 its dk and dv do not fit the registers and spill."""
    from absl import flags

    if not flags.FLAGS.is_parsed():  # else tokamax parses this process's arguments as its own
        flags.FLAGS.mark_as_parsed()
    from tokamax._src.ops.attention import base, pallas_mosaic_gpu_kernel_sm90, pallas_mosaic_gpu_vjp
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    small = q_BTNH.shape[-1] <= 128
    run = PallasMosaicGpuFlashAttention(
        config=pallas_mosaic_gpu_kernel_sm90.Config(block_q=64, block_kv=128 if small else 64, num_stages=2),
        vjp=pallas_mosaic_gpu_vjp.PallasMosaicGpuFlashAttentionVjp(
            config=pallas_mosaic_gpu_vjp.Config(
                block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2 if small else 1
            )
        ),
    )
    mask = base.Mask(k_start=first_BT[:, None], is_causal=True)
    asked = run.bind(q_BTNH, k_BTKH, v_BTKH, logits_scale=1.0, logits_soft_cap=cap, mask=mask).kwargs
    return run, {name: value for name, value in asked.items() if name != "return_residuals"}
