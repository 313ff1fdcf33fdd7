"""Keys and values in pages, and attention to them, by the paged kernel that JAX has for TPU.

The kernel (`jax.experimental.pallas.ops.tpu.ragged_paged_attention`) applies the cap and the window, and reads a row's
pages up to its length, nothing else. It takes keys and values of a position side by side, and at a head size of 256 one
kv head a call: more do not compile. So heads lie in arrays of their own there.

R rows, T tokens of a row in this chunk, J pages of a row, N query heads, K kv heads, G = N/K, H head size; heads are
those of a chip.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from gemma.config import Model
from gemma.engine.pages_xla import page_and_offset
from gemma.model.attention import MASKED

AXES = ("tensor",)  # over which mesh axes its arrays are cut
LANES = 128  # a head of so many numbers lies beside others in an array
BLOCK_POSITIONS = 512  # of a row, that the kernel has in VMEM at a time, twice
DECODE_QUERIES, PREFILL_QUERIES = 8, 32  # tokens that the kernel takes at a time


def empty(model: Model, count: int, page: int, dtype: jnp.dtype, tensor: int) -> tuple[jax.Array, ...]:
    """So many pages of a layer: arrays [tensor * pages, page, 2 * heads, H], cut over `tensor`."""
    heads = model.kv_heads // tensor
    together = heads if model.head_size == LANES else 1
    shape = (tensor * count, page, 2 * together, model.head_size)
    return tuple(jnp.zeros(shape, dtype) for _ in range(heads // together))


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
    """As `pages_xla.attend`. Of several tokens there is one row, with those that have a position in front."""
    R, T, N, H = q_RTNH.shape
    K, page = k_RTKH.shape[2], pages[0].shape[1]
    page_RT, offset_RT = page_and_offset(table_RJ, first_R, position_RT, page)
    there_RT = position_RT >= 0
    count_R = jnp.ones(R, jnp.int32) if T == 1 else jnp.sum(there_RT, axis=1, dtype=jnp.int32)
    length_R = jnp.maximum(1, jnp.max(position_RT, axis=1) + 1 - first_R * page)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_R, dtype=jnp.int32)])
    kv_RTK2H = jnp.stack([k_RTKH, v_RTKH], axis=3).astype(pages[0].dtype)
    together = K // len(pages)
    outs, written = [], []
    for part, kv in enumerate(pages):
        heads = slice(part * together, (part + 1) * together)
        new = kv_RTK2H[:, :, heads].reshape(R * T, 2 * together, H)
        kv = kv.at[page_RT.reshape(-1), offset_RT.reshape(-1)].set(new)
        out_tNH = ragged_paged_attention(
            q_RTNH[:, :, heads.start * N // K : heads.stop * N // K].reshape(R * T, together * N // K, H),
            kv,
            length_R,
            table_RJ,
            starts,
            jnp.array([R], jnp.int32),
            sliding_window=window,
            soft_cap=cap,
            mask_value=MASKED,
            num_kv_pages_per_block=max(1, min(BLOCK_POSITIONS // page, table_RJ.shape[1])),
            num_queries_per_block=min(R * T, DECODE_QUERIES if T == 1 else PREFILL_QUERIES),
        )
        outs.append(out_tNH.reshape(R, T, -1, H))
        written.append(kv)
    out_RTNH = jnp.concatenate(outs, axis=2)
    return jnp.where(there_RT[:, :, None, None], out_RTNH, 0), tuple(written)  # the kernel leaves the others unwritten
