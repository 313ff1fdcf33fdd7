"""Each platform's attention against the plain one, forward and backward.

B batch, T time, N query heads, K kv heads, H head size.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma.model import attention_cpu, attention_tpu
from gemma.model.attention import plain

CAP = 2.0  # bites: the logits below reach well beyond it
Attend = Callable[..., jax.Array]


def draw(T: int, N: int = 4, K: int = 2, H: int = 8, B: int = 2) -> tuple[jax.Array, ...]:
    """q, k, v with logits of a few units, and documents that end at uneven places."""
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segment_BT = np.cumsum(rng.random((B, T)) < 4 / T, axis=1)
    return q, k, v, jnp.asarray(segment_BT, jnp.int32)


def outputs(attend: Attend, inputs: tuple[jax.Array, ...], window: int | None, cap: float = CAP) -> list[np.ndarray]:
    """out, dq, dk, dv for a fixed random cotangent."""
    q, k, v, segment_BT = inputs
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(lambda *qkv: attend(*qkv, segment_BT, window=window, cap=cap), q, k, v)
        return out, *back(cotangent)

    return [np.asarray(x) for x in run(q, k, v)]


@pytest.mark.parametrize("window", [None, 100, 128, 129], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (4, 1)], ids=str)
def test_splash_equals_plain(window: int | None, heads: tuple[int, int]) -> None:
    inputs = draw(300, *heads)
    got = outputs(partial(attention_tpu.attend, interpret=True), inputs, window)
    for ours, want in zip(got, outputs(plain, inputs, window), strict=True):
        np.testing.assert_allclose(ours, want, atol=3e-5)


@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 200], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (4, 1)], ids=str)
def test_blocked_equals_plain(window: int | None, heads: tuple[int, int]) -> None:
    inputs = draw(300, *heads)
    for ours, want in zip(outputs(attention_cpu.attend, inputs, window), outputs(plain, inputs, window), strict=True):
        np.testing.assert_allclose(ours, want, atol=3e-5)


@pytest.mark.parametrize("H", [16, 64, 128, 256])
def test_splash_takes_every_length(H: int) -> None:
    """Shapes alone: the kernel refuses blocks that do not divide each other when it is built."""
    for T in [1, 2, 100, 127, 128, 129, *range(256, 1025, 64), 513, 700, 897, 1000, 1100, 1537, 2048, 3000, 4096, 8192]:
        q, kv = (jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16) for heads in (2, 1))
        segment_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def gradient(q: jax.Array, k: jax.Array, v: jax.Array, segment_BT: jax.Array) -> tuple[jax.Array, ...]:
            run = partial(attention_tpu.attend, window=4096, cap=50.0)
            return jax.grad(lambda *qkv: jnp.sum(run(*qkv, segment_BT)), (0, 1, 2))(q, k, v)

        assert jax.eval_shape(gradient, q, kv, kv, segment_BT)[0].shape == q.shape


def test_splash_equals_plain_where_the_block_is_no_power_of_two() -> None:
    inputs = draw(600, 2, 1, B=1)  # one block of 640, computed by 128
    got = outputs(partial(attention_tpu.attend, interpret=True), inputs, 200)
    for ours, want in zip(got, outputs(plain, inputs, 200), strict=True):
        np.testing.assert_allclose(ours, want, atol=3e-5)
