"""Attention on TPU: JAX's splash attention, a Pallas flash kernel that visits only the blocks the mask leaves.

B batch, T time, N query heads, K kv heads, H head size. Queries and keys are one sequence here, so keys have T too.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from gemma.model.attention_cpu import SAVED
from gemma.model.sharding import by_heads

LANES = 128  # a block's side is a multiple of the vector registers' lanes


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    window: int | None,
    cap: float,
    interpret: bool = False,
) -> jax.Array:
    """out_BTNH, as `gemma.model.attention.plain`. interpret: run the kernel's blocks as plain JAX, on any platform."""

    def local(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array) -> jax.Array:
        return kernel(q_BTNH, k_BTKH, v_BTKH, segment_BT, window=window, cap=cap, interpret=interpret)

    return by_heads(local)(q_BTNH, k_BTKH, v_BTKH, segment_BT)


def kernel(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array,
    *,
    window: int | None,
    cap: float,
    interpret: bool,
) -> jax.Array:
    """out_BTNH of one device's heads. Time is padded to whole blocks; the causal mask hides what is added."""
    T, N, H = q_BTNH.shape[1:]
    side = min(block_side(H), -(-T // LANES) * LANES)
    padded = -(-T // side) * side

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH, [(0, 0), (0, padded - T), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)

    before = None if window is None else window - 1
    mask = splash.LocalMask((padded, padded), window_size=(before, 0), offset=0)
    run = splash.make_splash_mha_single_device(
        splash.splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=block_sizes(side, padded),
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    segment_BT = jnp.pad(segment_BT, [(0, 0), (0, padded - T)])
    qkv = [heads_first(x) for x in (q_BTNH, k_BTKH, v_BTKH)]
    with jax.named_scope(f"window_{window}"):  # read by gemma.plan.hlo_cost: to the compiler a kernel is a black box
        out_BNTH = jax.vmap(run)(*qkv, splash.SegmentIds(segment_BT, segment_BT))
    return out_BNTH.transpose(0, 2, 1, 3)[:, :T]


def block_side(head_size: int) -> int:
    """Queries and keys of a block. At head size 256 a block of 1024 overflows v5p's VMEM."""
    return 1024 if head_size <= 128 else 512


def block_sizes(side: int, padded: int) -> splash.BlockSizes:
    """Of the forward pass, and of the backward one, which makes dq, dk and dv together.

    That writes a dq for each block of keys and sums them at the end: long blocks of keys halve those bytes.
    """
    keys = 2 * side if padded % (2 * side) == 0 else side
    compute = next(n for n in (512, 384, 256, LANES) if side % n == 0)  # it must divide the block of keys
    return splash.BlockSizes(
        block_q=side,
        block_kv=side,
        block_kv_compute=compute,
        block_q_dkv=side,
        block_kv_dkv=keys,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
