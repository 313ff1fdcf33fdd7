"""A host's verbs, in one process: which batches a step trains on, and that a state comes back to the bit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma.config import Mesh, Program
from gemma.text.order import Order
from gemma.train.data import Dataset
from gemma.train.trainer import Trainer
from tests.small_text import TEXTS, config, write_jsonl


@pytest.fixture
def trainer(program: Program, tmp_path: Path, compiled_programs: Path) -> Trainer:
    text = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    program = replace(program, data=config(text), mesh=Mesh(2, 2, 2))
    return Trainer(program, tmp_path, compiled_programs)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first place of each batch that is read, in order."""
    first: list[int] = []
    read = Dataset.train_rows

    def recording(self: Dataset, places: Sequence[int], start: int, stop: int) -> np.ndarray:
        if not first or first[-1] != places[0]:
            first.append(places[0])
        return read(self, places, start, stop)

    monkeypatch.setattr(Dataset, "train_rows", recording)
    return first


def test_step_n_trains_on_batch_n_before_and_after_a_restore(trainer: Trainer, asked: list[int]) -> None:
    trainer.restore(None)
    rows = trainer.run(0, 2, 0, 0).rows
    trainer.save(2)
    trainer.wait()
    trainer.restore(2)
    rows += trainer.run(2, 4, 2, 0).rows
    assert asked == [0, 8, 16, 24]
    assert [row.step for row in rows] == [1, 2, 3, 4]  # steps done


def test_a_restored_state_is_the_saved_one_to_the_bit(trainer: Trainer) -> None:
    trainer.restore(None)
    trainer.run(0, 3, 0, 0)
    trainer.save(3)
    trainer.wait()
    saved = jax.device_get(trainer.state)
    trainer.restore(None)
    trainer.restore(3)
    for one, other in zip(jax.tree.leaves(saved), jax.tree.leaves(jax.device_get(trainer.state)), strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_trace_holds_its_steps_and_ends_with_the_run(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    take = trainer.finish_step
    monkeypatch.setattr(trainer, "finish_step", lambda step, *rest: calls.append(f"{step}") or take(step, *rest))
    trainer.program = replace(trainer.program, profile=replace(trainer.program.profile, steps=(2, 99)))
    trainer.restore(None)
    for first, last in ((0, 2), (2, 3), (3, trainer.program.train.steps)):
        trainer.run(first, last, 0, 0)
    assert calls[:4] == ["1", "2", "start", "3"]
    assert calls[-1] == "stop"
    assert calls.count("start") == calls.count("stop") == 1


def test_a_restored_trainer_goes_on_with_the_rows_that_no_step_before_has_used(
    trainer: Trainer, asked: list[int]
) -> None:
    trainer.restore(None, order=Order(((0, 3), (2, 8)), ((22, 26),)))
    trainer.run(2, 5, 0, 0)
    assert asked == [6, 14, 26]  # two steps of three rows went before; the third batch meets the skipped rows
