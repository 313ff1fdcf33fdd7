"""Logits and gradients are those of Hugging Face's Gemma2ForCausalLM: by golden file everywhere, live where it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from gemma.config import Model
from gemma.model.load import load_hf
from gemma.model.transformer import Gemma
from gemma.train.loss import cross_entropy_sum
from gemma.weights import layout
from tests import hf_cases

MISTAKES: dict[str, Callable[[Model], Model]] = {
    "window-off-by-one": lambda m: replace(m, window=m.window + 1),
    "no-attention-cap": lambda m: replace(m, attention_cap=1e9),
    "no-final-cap": lambda m: replace(m, final_cap=1e9),
    "query-scale-of-the-head": lambda m: replace(m, query_scale=m.head_size**-0.5),
    "other-rope-base": lambda m: replace(m, rope_base=2 * m.rope_base),
}


def loss(params: dict, graph: nnx.GraphDef, tokens_BU: jax.Array) -> jax.Array:
    """Mean cross-entropy as training takes it: hidden states, then the chunked loss."""
    model = nnx.merge(graph, params)
    input_BT, target_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
    x_BTD, embedding_VD = model.hidden(input_BT, jnp.zeros_like(input_BT))
    weight_BT = jnp.ones(target_BT.shape)
    cap = model.config.final_cap
    return cross_entropy_sum(x_BTD, embedding_VD, target_BT, weight_BT, cap=cap, chunk=4) / target_BT.size


def gradients(model: Gemma, tokens_BU: np.ndarray) -> dict[str, np.ndarray]:
    """By leaf."""
    graph, state = nnx.split(model)
    found = jax.jit(jax.grad(loss), static_argnums=1)(nnx.to_pure_dict(state), graph, jnp.asarray(tokens_BU))
    return {leaf: np.asarray(array) for leaf, array in flatten_dict(found, sep=".").items()}


def by_tensor(model: Model, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our leaves as Hugging Face's tensors."""
    shapes, out = layout.tensor_shapes(model, layout.HF), {}
    for place in layout.places(model, layout.HF):
        part = leaves[place.slot.leaf][place.slot.index]
        out[place.tensor] = layout.to_stored(model, place, part).reshape(shapes[place.tensor])
    return out


@pytest.fixture(params=hf_cases.CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(case: str, tmp_path: Path) -> Gemma:
    return load_hf(hf_cases.write_folder(tmp_path / "hf", hf_cases.CASES[case]))


def test_logits_equal_the_golden_ones(case: str, model: Gemma) -> None:
    logits_BTV = model(hf_cases.tokens(hf_cases.CASES[case])[:, :-1])
    assert logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(logits_BTV, np.load(hf_cases.GOLDENS)[f"{case}/logits"], atol=1e-4, rtol=0)


def test_gradients_equal_the_golden_ones(case: str, model: Gemma) -> None:
    config, goldens = hf_cases.CASES[case], np.load(hf_cases.GOLDENS)
    found = by_tensor(config, gradients(model, hf_cases.tokens(config)))
    for name, gradient in found.items():
        np.testing.assert_allclose(
            hf_cases.probes(name, gradient), goldens[f"{case}/{name}"], atol=1e-4, rtol=1e-4, err_msg=name
        )


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("case", ["pairs-of-heads", "groups-of-four"])
def test_the_golden_logits_would_notice(mistake: str, case: str, tmp_path: Path) -> None:
    right = hf_cases.CASES[case]
    folder = hf_cases.write_folder(tmp_path / "hf", right)
    graph, state = nnx.split(load_hf(folder))
    wrong = Gemma(MISTAKES[mistake](right), rngs=nnx.Rngs(0))
    nnx.update(wrong, state)
    logits_BTV = wrong(hf_cases.tokens(right)[:, :-1])
    assert np.abs(logits_BTV - np.load(hf_cases.GOLDENS)[f"{case}/logits"]).max() > 1e-2  # a hundred tolerances


def test_bfloat16_weights_are_held_as_they_are_and_give_float32_logits(tmp_path: Path) -> None:
    small = hf_cases.SMALL
    folder = hf_cases.write_folder(tmp_path / "hf", small, "bfloat16")
    model = load_hf(folder, dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    logits_BTV = model(hf_cases.tokens(small)[:, :-1])
    assert logits_BTV.dtype == jnp.float32
    exact_BTV = load_hf(folder)(hf_cases.tokens(small)[:, :-1])
    assert 1e-4 < float(jnp.abs(logits_BTV - exact_BTV).mean()) < 0.2  # of logits up to 3


def test_the_golden_file_is_what_transformers_gives_now(case: str, model: Gemma) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.make_hf_goldens import logits_and_gradients

    config = hf_cases.CASES[case]
    tokens_BU = hf_cases.tokens(config)
    logits_BTV, theirs = logits_and_gradients(config, hf_cases.tensors(config), tokens_BU)
    np.testing.assert_allclose(model(tokens_BU[:, :-1]), logits_BTV, atol=1e-4, rtol=0)
    for name, gradient in by_tensor(config, gradients(model, tokens_BU)).items():
        np.testing.assert_allclose(gradient, theirs[name], atol=1e-4, rtol=1e-4, err_msg=name)
