"""Gemma 2's attention: grouped queries, a cap on the logits, a window on local layers, documents kept apart.

B batch, T query time, S key time, N query heads, K kv heads, G = N/K, H head size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gemma.model import attention_cpu

MASKED = -2.0e38  # finite, so that a row without any key stays finite too


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap): smoothly within (-cap, cap). Gemma 2 report, section 2."""
    return cap * jnp.tanh(x / cap)


def rope(x_BTNH: jax.Array, position_BT: jax.Array, base: float, platform: str) -> jax.Array:
    """Rotary embedding, first half against second half, as in Gemma (arXiv:2104.09864 with split halves)."""
    H = x_BTNH.shape[-1]
    timescale = base ** (jnp.arange(H // 2, dtype=jnp.float32) / (H // 2))
    angle_BT1h = position_BT[:, :, None, None].astype(jnp.float32) / timescale
    sin, cos = (jnp.concatenate([wave, wave], axis=-1) for wave in (jnp.sin(angle_BT1h), jnp.cos(angle_BT1h)))
    if platform == "tpu":  # lanes do not shift for free: a product with 1 and -1 is exact and rides along
        turn_HH = jnp.asarray(quarter_turn(H), x_BTNH.dtype)
        turned_BTNH = jnp.matmul(x_BTNH, turn_HH, precision=exact_precision(x_BTNH.dtype))
    else:
        first, second = jnp.split(x_BTNH, 2, axis=-1)
        turned_BTNH = jnp.concatenate([-second, first], axis=-1)
    rotated = x_BTNH.astype(jnp.float32) * cos + turned_BTNH.astype(jnp.float32) * sin
    return rotated.astype(x_BTNH.dtype)


def exact_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """At which a product with 1 and -1 is exact on a TPU: by default it rounds float32 factors to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def quarter_turn(H: int) -> np.ndarray:
    """turn_HH: x @ turn is (-second half, first half) of x."""
    turn_HH = np.zeros((H, H), np.float32)
    half = np.arange(H // 2)
    turn_HH[half + H // 2, half], turn_HH[half, half + H // 2] = -1, 1
    return turn_HH


def visible(segment_BT: jax.Array, window: int | None) -> jax.Array:
    """mask_BTS: key s is seen by query t when s <= t, both lie in one document, and t - s < window."""
    time = jnp.arange(segment_BT.shape[1])
    distance_TS = time[:, None] - time[None, :]
    mask_TS = distance_TS >= 0
    if window is not None:
        mask_TS &= distance_TS < window
    return mask_TS[None] & (segment_BT[:, :, None] == segment_BT[:, None, :])


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_BT: jax.Array,
    *,
    window: int | None,
    cap: float,
    platform: str,
) -> jax.Array:
    """out_BTNH by the kernel that serves `platform`: that of the devices the program is compiled for, which need not
    be here. q comes already scaled. All give what `plain` gives, which defines it."""
    if platform == "tpu":
        from gemma.model import attention_tpu  # Pallas is half a second that no other platform pays

        return attention_tpu.attend(q_BTNH, k_BSKH, v_BSKH, segment_BT, window=window, cap=cap)
    if cap <= attention_cpu.LARGEST_CAP:
        return attention_cpu.attend(q_BTNH, k_BSKH, v_BSKH, segment_BT, window=window, cap=cap)
    return plain(q_BTNH, k_BSKH, v_BSKH, segment_BT, window=window, cap=cap)


def plain(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_BT: jax.Array,
    *,
    window: int | None,
    cap: float,
) -> jax.Array:
    """out_BTNH, in q's dtype; the softmax is taken in float32. Every (query, key) pair is computed, then masked."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits_BKGTS = soft_cap(logits_BKGTS, cap)
    mask_BTS = visible(segment_BT, window)
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(q_BTNH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)
