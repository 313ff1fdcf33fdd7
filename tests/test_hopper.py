"""The kernels for NVIDIA GPUs, without a GPU: against plain attention by interpretation, and lowered for CUDA.

Most need the optional package: python -m pip install -c constraints.txt tokamax

B batch, T time, N query heads, K kv heads, H head size.
"""

from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma.config import Model
from gemma.model import attention_gpu
from gemma.model.attention import attend, plain, visible
from gemma.model.transformer import Gemma
from tests.mosaic_on_cpu import interpret, pretend_hopper
from tests.test_attention import draw

CAP = 2.0  # bites: the logits below reach well beyond it


def installed() -> str | None:
    try:
        return metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        return None


needs_tokamax = pytest.mark.skipif(
    installed() != attention_gpu.TOKAMAX, reason=f"tokamax {attention_gpu.TOKAMAX} is not installed"
)


def half(T: int, heads: tuple[int, int], H: int, dtype: str) -> tuple[jax.Array, ...]:
    q, k, v, segment_BT = draw(T, *heads, H, B=1)
    q, k, v = (x.astype(dtype) for x in (q * 2 * H**-0.5, k, v))
    return q, k, v, segment_BT


@pytest.mark.parametrize("window", [None, 1, 40], ids=str)
def test_keys_from_first_seen_are_those_visible(window: int | None) -> None:
    segment_BT = draw(300)[3]
    time_T = jnp.arange(300)
    first_BT = attention_gpu.first_seen(segment_BT, window)
    seen_BTS = (first_BT[:, :, None] <= time_T) & (time_T <= time_T[:, None])
    np.testing.assert_array_equal(seen_BTS, visible(segment_BT, window))


@pytest.mark.parametrize(
    ("dtype", "H", "hopper_here"), [("bfloat16", 128, False), ("float32", 128, True), ("bfloat16", 64, True)]
)
def test_a_gpu_that_the_kernels_do_not_serve_computes_by_xla(
    dtype: str, H: int, hopper_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gpu, "available", lambda: hopper_here)
    inputs = half(70, (2, 1), H, dtype)
    kwargs = {"window": 40, "cap": CAP}
    lowered = [jax.jit(partial(attend, **kwargs, platform=p)).lower(*inputs).as_text() for p in ("gpu", "cpu")]
    assert lowered[0] == lowered[1]


def test_time_is_padded_to_whole_blocks_and_cut_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash(cap: float, q: jax.Array, k: jax.Array, v: jax.Array, first_BT: jax.Array) -> jax.Array:
        assert q.shape[1] == k.shape[1] == v.shape[1] == first_BT.shape[1] == 384
        return plain(q, k, v, first_BT, window=40, cap=cap)  # here a document is a first key

    monkeypatch.setattr(attention_gpu, "flash", flash)
    inputs = draw(300)
    want = plain(*inputs, window=40, cap=CAP)
    monkeypatch.setattr(attention_gpu, "first_seen", lambda segment_BT, _: segment_BT)
    np.testing.assert_allclose(attention_gpu.attend(*inputs, window=40, cap=CAP), want, atol=1e-6)


@needs_tokamax
@pytest.mark.parametrize(
    ("dtype", "H", "heads", "window", "tolerance"),
    [
        ("float16", 128, (2, 1), 40, 1e-3),
        ("bfloat16", 128, (1, 1), None, 8e-3),
        ("float16", 256, (2, 1), 40, 1e-3),
    ],
)
def test_kernels_interpreted_equal_plain(
    dtype: str,
    H: int,
    heads: tuple[int, int],
    window: int | None,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T is not whole blocks for `attend`; what it pads to is given here at once, because an interpreted kernel has
    side effects, which JAX does not differentiate."""
    T = 256
    q, k, v, segment_BT = half(T, heads, H, dtype)
    dout = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), dtype)
    first_BT = attention_gpu.first_seen(segment_BT, window)

    @jax.jit
    def run() -> tuple[jax.Array, ...]:
        out, residuals = attention_gpu.forward(CAP, q, k, v, first_BT)
        return out, *attention_gpu.backward(CAP, residuals, dout)[:3]

    pretend_hopper(monkeypatch)
    got = interpret(monkeypatch, run)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    out, back = jax.vjp(lambda *qkv: plain(*qkv, segment_BT, window=window, cap=CAP), *exact)
    for ours, want in zip(got, (out, *back(dout.astype(jnp.float32))), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), want, atol=tolerance * float(jnp.max(jnp.abs(want))))


@needs_tokamax
@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("H", [128, 256])
def test_a_models_gradient_lowers_for_cuda(remat: str, H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local and a global block, each one kernel forward and two backward; `full` makes the forward ones again."""
    pretend_hopper(monkeypatch)
    config = Model(
        name="test",
        vocab=16,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=H,
        hidden=32,
        window=100,
        attention_cap=50.0,
        final_cap=30.0,
        query_scale=H**-0.5,
        context=512,
        rope_base=10000.0,
        norm_eps=1e-6,
    )
    create = partial(Gemma, config, dtype="bfloat16", remat=remat, platform="gpu")
    graph, params = nnx.split(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))

    def loss(params: nnx.State, tokens_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens_BT, segment_BT).mean()

    tokens_BT = jax.ShapeDtypeStruct((2, 300), jnp.int32)
    traced = jax.jit(jax.grad(loss)).trace(params, tokens_BT, tokens_BT)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == {"full": 8, "dots": 6}[remat]
