"""The chunked cross-entropy against one over all logits, and which tokens a batch is asked for.

B batch, T time, U = T + 1, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gemma.config import Program
from gemma.model.transformer import Gemma
from gemma.text.tokenizer import BOS, EOS, PAD
from gemma.train.loss import cross_entropy_sum
from gemma.train.step import loss_sum

CAP = 3.0
Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def draw_inputs(B: int = 2, T: int = 10, D: int = 6, V: int = 37) -> Inputs:
    """Hidden states whose logits reach well beyond CAP, and weights of which a quarter are 0."""
    rng = np.random.default_rng(0)
    x_BTD, embedding_VD = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    target_BT, weight_BT = rng.integers(0, V, (B, T)), rng.random((B, T)) > 0.25
    return (
        jnp.asarray(x_BTD, jnp.float32),
        jnp.asarray(embedding_VD, jnp.float32),
        jnp.asarray(target_BT),
        jnp.asarray(weight_BT, jnp.float32),
    )


def over_all_logits(x_BTD: jax.Array, embedding_VD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    logits_BTV = CAP * jnp.tanh(x_BTD @ embedding_VD.T / CAP)
    return jnp.sum(weight_BT * optax.softmax_cross_entropy_with_integer_labels(logits_BTV, target_BT))


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
def test_chunks_of_any_size_give_the_value_and_gradient_of_all_logits(chunk: int) -> None:
    inputs = draw_inputs()
    chunked = partial(cross_entropy_sum, cap=CAP, chunk=chunk)
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*inputs) for f in (chunked, over_all_logits))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_the_embeddings_gradient_is_summed_over_chunks_in_float32() -> None:
    """512 chunks that each add about as much: in bfloat16 the sum would stand still at half."""
    x_BTD = jnp.full((1, 2048, 2), 0.7, jnp.bfloat16)
    embedding_VD = jnp.zeros((8, 2), jnp.float32)
    target_BT, weight_BT = jnp.zeros((1, 2048), jnp.int32), jnp.ones((1, 2048), jnp.float32)
    loss = partial(cross_entropy_sum, cap=CAP, chunk=4)
    got_VD = jax.jit(jax.grad(loss, argnums=1))(x_BTD, embedding_VD, target_BT, weight_BT)
    slope_V = np.full(8, 1 / 8) - (np.arange(8) == 0)  # of equal logits
    want_VD = 2048 * slope_V[:, None] * float(jnp.bfloat16(0.7)) * np.ones(2)
    np.testing.assert_allclose(got_VD, want_VD, rtol=1e-4)


def shapes_in(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """Of everything a program computes, in its loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if inner := getattr(inner, "jaxpr", inner if hasattr(inner, "eqns") else None):
                yield from shapes_in(inner)


@pytest.mark.parametrize("function", [lambda f: f, partial(jax.grad, argnums=(0, 1))], ids=["value", "gradient"])
def test_no_array_is_larger_than_the_logits_of_one_chunk(function: Callable[..., Callable[..., jax.Array]]) -> None:
    B, T, D, V, chunk = 2, 64, 6, 97, 8
    program = function(partial(cross_entropy_sum, cap=CAP, chunk=chunk))
    shapes = list(shapes_in(jax.make_jaxpr(program)(*draw_inputs(B, T, D, V)).jaxpr))
    assert max(map(prod, shapes)) == B * chunk * V


@pytest.fixture(scope="module")
def model(program: Program) -> Gemma:
    """With caps and windows as a run has them."""
    return jax.jit(lambda: Gemma(program.model, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def loss_of(program: Program, model: Gemma) -> Callable[[list[int]], tuple[float, float]]:
    """(loss sum, target count) of one row of tokens, through the train step's own loss."""
    graph, params = nnx.split(model)
    jitted = jax.jit(partial(loss_sum, program, graph))

    def of(row: list[int]) -> tuple[float, float]:
        total, count = jitted(nnx.to_pure_dict(params), jnp.asarray([row]))
        return float(total), float(count)

    return of


FIRST = [BOS, 20, 31, 42, 53, EOS]
SECOND = [BOS, 75, 64, 97, 86, 45, 34, EOS]


def test_each_token_is_predicted_from_those_before_it_in_its_document(
    loss_of: Callable[[list[int]], tuple[float, float]], model: Gemma
) -> None:
    row = [7, 8, EOS, *FIRST, *SECOND, PAD, PAD]  # starts in the middle of a document
    segment = [0] * 3 + [1] * len(FIRST) + [2] * (len(SECOND) + 2)
    log_p = jax.nn.log_softmax(model(jnp.asarray([row]), jnp.asarray([segment])))[0]
    asked = [u for u in range(1, len(row)) if row[u] not in (BOS, PAD)]
    want = -sum(float(log_p[u - 1, row[u]]) for u in asked)
    assert loss_of(row) == (pytest.approx(want, rel=1e-5), len(asked))


@pytest.mark.parametrize("special", [BOS, PAD])
def test_a_special_target_carries_no_weight(loss_of: Callable[[list[int]], tuple[float, float]], special: int) -> None:
    total, count = loss_of([*FIRST, special])
    assert (total, count) == (pytest.approx(loss_of(FIRST)[0], rel=1e-6), len(FIRST) - 1)


def test_the_end_of_a_document_is_a_target(loss_of: Callable[[list[int]], tuple[float, float]]) -> None:
    assert loss_of(FIRST)[1] == loss_of(FIRST[:-1])[1] + 1


@pytest.mark.parametrize("before", [FIRST, [BOS, 99, 98, 97, 96, EOS], [5, 5, EOS]])
def test_what_stands_before_a_document_does_not_change_its_loss(
    loss_of: Callable[[list[int]], tuple[float, float]], before: list[int]
) -> None:
    assert loss_of(before + SECOND)[0] - loss_of(before)[0] == pytest.approx(loss_of(SECOND)[0], rel=1e-5)
