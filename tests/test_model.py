"""The model against a NumPy Gemma 2, and what each token may see."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from gemma.config import Model
from gemma.model.attention import attend, rope
from gemma.model.transformer import Block, Gemma, lookup, positions, rms_norm
from tests import gemma_reference

CONF = Path(__file__).parents[1] / "conf" / "model"
# Groups of 1, 2 and 4, widths that are no power of two, caps that bite, query scales that are not head_size**-0.5.
SMALL = Model(
    name="small",
    vocab=31,
    width=20,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=6,
    hidden=28,
    window=3,
    attention_cap=5.0,
    final_cap=3.0,
    query_scale=(20 / 4) ** -0.5,
    context=64,
    rope_base=10000.0,
    norm_eps=1e-6,
)
CASES = {
    "pairs-of-heads": SMALL,
    "no-groups": replace(SMALL, width=36, layers=2, heads=2, kv_heads=2, head_size=8, window=5, query_scale=0.5),
    "groups-of-four": replace(SMALL, width=24, layers=2, heads=8, kv_heads=2, head_size=4, query_scale=0.7),
    "one-kv-head": replace(SMALL, layers=2, heads=4, kv_heads=1, window=4, query_scale=0.6),
}
MISTAKES = {
    "window-off-by-one": lambda c: replace(c, window=c.window + 1),
    "no-window": lambda c: replace(c, window=c.context),
    "no-attention-cap": lambda c: replace(c, attention_cap=1e9),
    "no-final-cap": lambda c: replace(c, final_cap=1e9),
    "query-scale-of-the-head": lambda c: replace(c, query_scale=c.head_size**-0.5),
    "other-rope-base": lambda c: replace(c, rope_base=500.0),
}


def random_params(config: Model) -> dict[str, Any]:
    """Weights three times as large as at the start, so that the caps bite, and norm scales away from 0."""
    rng = np.random.default_rng(0)
    _, shapes = graph_and_shapes(config)

    def draw(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> np.ndarray:
        std = 0.4 if "norm" in jax.tree_util.keystr(path) else 3 * config.width**-0.5
        return rng.normal(0.0, std, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def graph_and_shapes(config: Model, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0), dtype=dtype)))
    return graph, nnx.to_pure_dict(state)


def apply(config: Model, params: dict[str, Any]) -> Callable[..., jax.Array]:
    graph, _ = graph_and_shapes(config)
    return partial(jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs)), params)


def draw_tokens(config: Model, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab, shape)


def one_block(config: Model, *, local: bool) -> Block:
    """A block with the weights of a single pair, as the scan hands it out."""
    params = random_params(config)["pairs"]["local_block" if local else "global_block"]
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: Block(config, local=local, platform="cpu", reduce_dtype="float32", rngs=nnx.Rngs(0)))
    )
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(x[0]), params))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference(case: str) -> None:
    config = CASES[case]
    params, tokens_BT = random_params(config), draw_tokens(config, 2, 5 * config.window)
    got = apply(config, params)(tokens_BT)
    want = np.stack([gemma_reference.forward(params, config, tokens_T) for tokens_T in tokens_BT])
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("case", CASES)
def test_the_comparison_would_notice(case: str, mistake: str) -> None:
    config = CASES[case]
    params, tokens_T = random_params(config), draw_tokens(config, 5 * config.window)
    right = gemma_reference.forward(params, config, tokens_T)
    wrong = gemma_reference.forward(params, MISTAKES[mistake](config), tokens_T)
    assert np.abs(right - wrong).max() > 1e-2  # a hundred times the tolerance


def test_rms_norm_adds_eps_to_the_mean_square() -> None:
    x_D = np.array([1e-3, -2e-3, 3e-3], np.float32)  # mean square 4.7e-6: eps of 1e-6 shows
    scale_D = np.array([0.5, -0.25, 0.0], np.float32)
    want = x_D / np.sqrt(np.mean(x_D.astype(np.float64) ** 2) + 1e-6) * (1 + scale_D)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x_D), jnp.asarray(scale_D), 1e-6), want, rtol=1e-6)


def test_rms_norm_is_computed_in_float32() -> None:
    x_D = jnp.linspace(-3.0, 3.0, 64, dtype=jnp.bfloat16)
    exact = rms_norm(x_D.astype(jnp.float32), jnp.full(64, 0.3), 1e-6)
    np.testing.assert_array_equal(rms_norm(x_D, jnp.full(64, 0.3), 1e-6), exact.astype(jnp.bfloat16))


def test_bfloat16_embeddings_are_scaled_by_the_rounded_root_of_width() -> None:
    params, tokens_BT = random_params(SMALL), draw_tokens(SMALL, 1, 4)
    params["final_norm"] *= 0
    for block in params["pairs"].values():
        block["norms_P4D"] = np.full_like(block["norms_P4D"], -1.0)  # every block adds 0
    graph, _ = graph_and_shapes(SMALL, "bfloat16")
    x_BTD, embedding_VD = nnx.merge(graph, params).hidden(tokens_BT, jnp.zeros_like(tokens_BT))
    scaled_BTD = embedding_VD.astype(jnp.bfloat16)[tokens_BT] * jnp.bfloat16(20**0.5)
    np.testing.assert_array_equal(x_BTD, rms_norm(scaled_BTD, jnp.zeros(20), 1e-6))


@pytest.mark.parametrize("local", [True, False], ids=["local", "global"])
def test_a_block_sees_itself_its_window_and_its_document(local: bool) -> None:
    config, T = replace(SMALL, window=4), 14
    block, segment_T = one_block(config, local=local), np.array([0] * 5 + [1] * 9)
    segment_BT = jnp.asarray(segment_T[None])
    x_TD = jnp.asarray(np.random.default_rng(2).normal(size=(T, config.width)), jnp.float32)
    see = jax.jit(jax.jacrev(lambda x_TD: block(x_TD[None], segment_BT, positions(segment_BT))[0]))
    influence_TS = np.abs(see(x_TD)).sum(axis=(1, 3))
    t, s = np.mgrid[:T, :T]
    allowed_TS = (s <= t) & (segment_T[t] == segment_T[s]) & ((t - s < 4) if local else True)
    np.testing.assert_array_equal(influence_TS != 0, allowed_TS)


def test_query_head_n_reads_kv_head_n_over_group() -> None:
    rng = np.random.default_rng(3)
    qkv = [jnp.asarray(rng.normal(size=(1, 6, heads, 4)), jnp.float32) for heads in (6, 2, 2)]
    segment_BT = jnp.zeros((1, 6), jnp.int32)
    out_N = jax.jit(
        lambda q, k, v: attend(q, k, v, segment_BT, window=None, cap=50.0, platform="cpu")[0, :, :, 0].sum(axis=0)
    )
    own, read = np.eye(6, dtype=bool), np.arange(6)[:, None] // 3 == np.arange(2)
    for of, want in zip(jax.jit(jax.jacrev(out_N, argnums=(0, 1, 2)))(*qkv), (own, read, read), strict=True):
        np.testing.assert_array_equal(np.abs(of).sum(axis=(1, 2, 4)) != 0, want)


def test_a_token_changes_no_logits_before_it() -> None:
    model, tokens_BT = apply(SMALL, random_params(SMALL)), draw_tokens(SMALL, 1, 12)
    changed_BT = tokens_BT.copy()
    changed_BT[0, 7] = (changed_BT[0, 7] + 1) % SMALL.vocab
    same_T = np.all(model(tokens_BT) == model(changed_BT), axis=(0, 2))
    assert same_T.tolist() == [True] * 7 + [False] * 5


def test_packed_documents_have_the_logits_they_have_alone() -> None:
    model, tokens_BT = apply(SMALL, random_params(SMALL)), draw_tokens(SMALL, 1, 18)
    packed = model(tokens_BT, np.array([[1] * 9 + [2] * 9]))
    alone = jnp.concatenate([model(tokens_BT[:, :9]), model(tokens_BT[:, 9:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=2e-5, rtol=0)  # sums over another length round otherwise


def test_positions_restart_with_each_document() -> None:
    segment_BT = jnp.asarray([[0, 0, 0, 1, 1, 2, 3, 3], [5, 5, 5, 5, 5, 5, 5, 6]])
    want = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    np.testing.assert_array_equal(positions(segment_BT), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_turns_alike_on_every_platform(dtype: jnp.dtype) -> None:
    x_BTNH = jnp.asarray(np.random.default_rng(5).normal(size=(2, 7, 3, 16)), dtype)
    position_BT = jnp.arange(14).reshape(2, 7)
    tpu, cpu = (rope(x_BTNH, position_BT, 10000.0, platform) for platform in ("tpu", "cpu"))
    np.testing.assert_array_equal(tpu, cpu)


def test_rope_keeps_products_that_are_equally_far_apart() -> None:
    q, k = np.random.default_rng(4).normal(size=(2, 1, 1, 1, 8))

    def product(t: int, s: int) -> float:
        turned = [rope(jnp.asarray(x), jnp.asarray([[at]]), 10000.0, "cpu") for x, at in ((q, t), (k, s))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(5, 0), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 3), abs=1e-2)


@pytest.mark.parametrize(
    "name, embedding, other",
    [
        ("gemma2_2b", 590_118_912, 2_024_517_888),
        ("gemma2_9b", 917_962_752, 8_324_201_984),
        ("gemma2_27b", 1_180_237_824, 26_047_480_320),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, embedding: int, other: int) -> None:
    """Gemma 2 report, table 2."""
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Gemma(published(name), rngs=nnx.Rngs(0)))))
    assert prod(params.pop("embedding_VD").shape) == embedding
    assert sum(prod(x.shape) for x in jax.tree.leaves(params)) == other


@pytest.mark.parametrize("name, divisor", [("gemma2_2b", 256), ("gemma2_9b", 256), ("gemma2_27b", 4608 / 32)])
def test_query_scales_are_the_published_ones(name: str, divisor: float) -> None:
    """27B divides by width / heads, not by its head size of 128."""
    assert published(name).query_scale == pytest.approx(divisor**-0.5, rel=1e-12)


def published(name: str) -> Model:
    return Model(**yaml.safe_load((CONF / f"{name}.yaml").read_text())["model"])


@pytest.mark.parametrize("V", [200_000, 9], ids=["vocabulary larger than the batch", "smaller"])
def test_an_embeddings_gradient_is_summed_in_float32_and_rounded_once(V: int) -> None:
    """In bfloat16 a sum stands still once it is 256 times an addend: a token met 30,000 times had lost most of it."""
    times = [1, 3, 256, 1_000, 3_000, 10_000, 30_000]
    tokens_BT = np.repeat(np.arange(len(times)) + V - 9, times).reshape(1, -1)
    tokens_BT = np.random.default_rng(0).permutation(tokens_BT, axis=1)
    dx_BTD = jnp.asarray(np.random.default_rng(1).normal(0.3, 1.0, (*tokens_BT.shape, 2)), jnp.bfloat16)
    want_VD = np.zeros((V, 2))
    np.add.at(want_VD, tokens_BT[0], np.asarray(dx_BTD[0], np.float64))

    @jax.jit
    def gradient(tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        embedding_VD = jnp.zeros((V, 2), jnp.float32)
        return jax.vjp(lambda e_VD: lookup("bfloat16", "bfloat16", e_VD, tokens_BT), embedding_VD)[1](dx_BTD)[0]

    got_VD = gradient(tokens_BT, dx_BTD)
    np.testing.assert_allclose(
        got_VD, want_VD, rtol=2**-8, atol=1e-4
    )  # bfloat16 has 8 bits: half of the last, and some
