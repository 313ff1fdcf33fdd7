"""What the paged kernel of TPUs is given makes it give what XLA gives: caps, windows, chunks, rows of nobody.

The kernel itself runs on TPUs alone: JAX's interpreters of it stumble over its reshaped buffers. Its place is taken by
the plain function beside it that defines it, `ref_ragged_paged_attention`; that it compiles is shown by test_plan.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ref_ragged_paged_attention

from gemma.config import Model
from gemma.engine import pages_tpu, pages_xla
from tests import hf_cases

PAGE, PAGES = 8, 24
MODEL: Model = hf_cases.CASES["pairs-of-heads"]


def model_of(kv_heads: int, head_size: int) -> Model:
    return replace(MODEL, heads=2 * kv_heads, kv_heads=kv_heads, head_size=head_size)


def filled(seed: int, model: Model, rows: list[list[int]], firsts: list[int], J: int) -> dict[str, Any]:
    """A chunk's queries, keys and values, and a table of pages, all different. rows: the positions of each row."""
    rng = np.random.default_rng(seed)
    R, T = len(rows), len(rows[0])
    H, K, N = model.head_size, model.kv_heads, model.heads
    table = rng.permutation(np.arange(1, PAGES))[: R * J].reshape(R, J)
    return {
        "q_RTNH": rng.normal(size=(R, T, N, H)).astype(np.float32) * 0.3,
        "k_RTKH": rng.normal(size=(R, T, K, H)).astype(np.float32),
        "v_RTKH": rng.normal(size=(R, T, K, H)).astype(np.float32),
        "table_RJ": table.astype(np.int32),
        "first_R": np.array(firsts, np.int32),
        "position_RT": np.array(rows, np.int32),
    }


def same_pages(seed: int, model: Model) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The same keys and values in the pages of both."""
    rng = np.random.default_rng(seed)
    keys, values = (rng.normal(size=(model.kv_heads, PAGES, PAGE, model.head_size)).astype(np.float32) for _ in "kv")
    empty = pages_tpu.empty(model, PAGES, PAGE, jnp.dtype("float32"), 1)
    together = model.kv_heads // len(empty)
    both = np.stack([keys, values], axis=3).transpose(1, 2, 0, 3, 4)  # pages, page, K, 2, H
    parts = [both[:, :, n * together : (n + 1) * together].reshape(empty[0].shape) for n in range(len(empty))]
    return (jnp.asarray(keys.transpose(1, 0, 3, 2)), jnp.asarray(values.transpose(1, 0, 2, 3))), tuple(
        map(jnp.asarray, parts)
    )


def defined(
    q_tNH: jax.Array, *given: jax.Array, num_kv_pages_per_block: int, num_queries_per_block: int, **how: Any
) -> Any:
    """The kernel by its definition; what it leaves unwritten is NaN."""
    assert num_kv_pages_per_block <= given[2].shape[1]
    assert num_queries_per_block <= len(q_tNH)
    found = ref_ragged_paged_attention(q_tNH, *given, **how)
    return jnp.pad(found, ((0, len(q_tNH) - len(found)), (0, 0), (0, 0)), constant_values=jnp.nan)


@pytest.mark.parametrize(("kv_heads", "head_size"), [(2, 128), (2, 256)])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize(
    ("rows", "firsts"),
    [([[21], [0], [33], [-1]], [0, 0, 2, 0]), ([[17, 18, 19, 20, 21, 22, 23, 24, 25, -1, -1, -1]], [0])],
    ids=["decode", "chunk"],
)
def test_the_kernel_gives_what_xla_gives(
    kv_heads: int,
    head_size: int,
    window: int | None,
    rows: list[list[int]],
    firsts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages_tpu, "ragged_paged_attention", defined)
    model = model_of(kv_heads, head_size)
    firsts = firsts if window else [0] * len(firsts)
    given = filled(3, model, rows, firsts, 5)
    xla, tpu = same_pages(4, model)
    wanted, (keys, values) = pages_xla.attend(pages=xla, window=window, cap=2.0, **given)
    found, written = pages_tpu.attend(pages=tpu, window=window, cap=2.0, **given)
    there = given["position_RT"] >= 0
    np.testing.assert_allclose(np.asarray(found)[there], np.asarray(wanted)[there], atol=2e-6)
    assert not np.asarray(found)[~there].any()
    both = np.concatenate([np.asarray(part).reshape(PAGES, PAGE, -1, 2, head_size) for part in written], axis=2)
    np.testing.assert_array_equal(both[1:, :, :, 0].transpose(0, 2, 3, 1), keys[1:])  # page 0 is nobody's
    np.testing.assert_array_equal(both[1:, :, :, 1].transpose(0, 2, 1, 3), values[1:])
