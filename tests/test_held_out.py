"""Held-out loss: which rows it is taken of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemma.config import ConfigError, Eval, Mesh, Program
from gemma.model.sharding import make_mesh
from gemma.text import corpus
from gemma.text.tokenizer import PAD
from gemma.train import held_out
from gemma.train.step import functions
from tests.small_text import SEQUENCE, TEXTS, config, write_jsonl


def numbered(length: int) -> np.ndarray:
    """Every token is its own position."""
    return np.arange(1, length + 1, dtype=np.uint32)


def starts(one: held_out.EvalSet, batch: int) -> list[int]:
    """The first token of each row that is evaluated, in order."""
    rows = np.concatenate([held_out.batch_rows(one, first, 0, batch) for first in range(0, one.rows, batch)])
    assert (rows[one.rows :] == PAD).all()
    return rows[: one.rows, 0].tolist()


def test_the_sample_is_the_same_for_every_batch() -> None:
    one = held_out.sampled("x", numbered(SEQUENCE * 100 + 1), SEQUENCE, 20)
    assert starts(one, 3) == starts(one, 8) == starts(one, 64)
    assert len(set(starts(one, 8))) == 20


def test_the_sample_lies_over_the_whole_set() -> None:
    drawn = starts(held_out.sampled("x", numbered(SEQUENCE * 1000 + 1), SEQUENCE, 100), 8)
    quarters = np.bincount(np.array(drawn) // (SEQUENCE * 250), minlength=4)
    assert quarters.min() >= 15, quarters


def test_a_set_smaller_than_the_sample_is_evaluated_whole_each_row_once() -> None:
    drawn = starts(held_out.sampled("x", numbered(SEQUENCE * 10 + 1), SEQUENCE, 64), 8)
    assert sorted(drawn) == [1 + SEQUENCE * row for row in range(10)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    write_jsonl(root / "a.jsonl", TEXTS)
    write_jsonl(root / "other.jsonl", [f"another {text}" for text in TEXTS])
    return root


def judged(program: Program, root: Path, mesh: Mesh, batch: int) -> tuple[Any, ...]:
    """The losses with fresh weights."""
    program = replace(
        program,
        data=config(root / "a.jsonl"),
        mesh=mesh,
        train=replace(program.train, batch=batch),
        eval=Eval(every=1, rows=13, sets={"other": str(root / "other.jsonl")}, tasks=(), limit=None, data=None),
    )
    texts = corpus.open_texts(program.data, program.eval, root / "cache", program.model.vocab)
    sets = held_out.eval_sets(program, texts)
    made = functions(program, make_mesh(program.mesh))
    with jax.default_device(jax.devices()[0]):
        return held_out.losses(made.eval, made.init().params, made.batch, sets)


def test_the_loss_is_the_same_for_every_batch_and_mesh(program: Program, small: Path) -> None:
    one = judged(program, small, Mesh(1, 8, 1), 8)
    other = judged(program, small, Mesh(2, 2, 2), 16)
    assert [(name, targets) for name, _, targets in one] == [(name, targets) for name, _, targets in other]
    assert [name for name, _, _ in one] == ["held_out", "other"]
    np.testing.assert_allclose([loss for _, loss, _ in one], [loss for _, loss, _ in other], rtol=1e-5)
    assert one[0][1] != one[1][1]


def test_a_set_without_a_row_is_refused_by_its_name(program: Program, small: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("tiny")
    program = replace(
        program, eval=Eval(every=1, rows=4, sets={"web": str(tmp_path / "tiny.txt")}, tasks=(), limit=None, data=None)
    )
    program = replace(program, data=config(small / "a.jsonl"))
    texts = corpus.open_texts(program.data, program.eval, tmp_path / "cache", program.model.vocab)
    with pytest.raises(ConfigError, match=r"eval\.sets\.web=.*tiny\.txt: 6 tokens, less than one row"):
        held_out.eval_sets(program, texts)
    short = replace(texts.own.tokens, eval=texts.own.tokens.eval[:SEQUENCE])
    with pytest.raises(ConfigError, match="data.path=.*16 held-out tokens.*data.eval_fraction=0.1"):
        held_out.eval_sets(program, replace(texts, own=replace(texts.own, tokens=short)))
