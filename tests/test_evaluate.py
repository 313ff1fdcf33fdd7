"""launch.evaluate: the second program of the controller. What it finds is what training finds, whatever is killed."""

import json
import os
import signal
from pathlib import Path

import pytest

from gemma.config import Guard
from gemma.messages import BadStep
from orchestrator.programs.evaluate import RESULT, answered, by_set
from orchestrator.programs.rewind import GoBack, Stop, decide_rewind, over_budget, since_last_good
from orchestrator.programs.window import RECENT, Pace, deadline_of, learn
from orchestrator.record import rundir
from tests.runs import SMALL, event_names, finish, launch, losses, wait_for_step

BATCHES = 50


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a trained run, and an evaluation of it that nothing disturbed."""
    root = tmp_path_factory.mktemp("runs")
    finish(launch("train", f"run.root={root}", "run.id=trained", *SMALL), 0)
    evaluation(root, "undisturbed")
    return root


def evaluation(root: Path, name: str, *more: str) -> Path:
    finish(
        launch("evaluate", "run=trained", f"run.root={root}", f"run.id={name}", f"eval.rows={8 * BATCHES}", *more), 0
    )
    return root / name


def found(folder: Path) -> dict[str, float]:
    return json.loads((folder / RESULT).read_text())


def test_it_finds_the_loss_that_training_found(root: Path) -> None:
    finish(launch("evaluate", "run=latest", f"run.root={root}", "run.id=as-trained"), 0)
    trained = [event for event in rundir.events(root / "trained") if event["event"] == "eval"][-1]
    assert found(root / "as-trained")["loss"] == trained["loss"]
    assert rundir.read_manifest(root / "as-trained").parent == {"id": "trained", "step": 40}


def test_killed_hosts_change_nothing_and_no_batch_is_computed_twice(root: Path) -> None:
    folder = evaluation(root, "killed", "chaos.faults=[worker@5/0,worker@10/1]")
    assert event_names(folder).count("failure") == 2
    assert losses(folder) == losses(root / "undisturbed")
    assert found(folder) == found(root / "undisturbed")
    steps = [row["step"] for row in rundir.read_lines(folder / "metrics.jsonl")]
    assert steps == list(range(1, BATCHES + 1))


def test_a_killed_controller_is_resumed_by_id(root: Path) -> None:
    process = launch("evaluate", "run=trained", f"run.root={root}", "run.id=resumed", f"eval.rows={8 * BATCHES}")
    folder = root / "resumed"
    wait_for_step(process, folder, 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = max(losses(folder))
    finish(launch("resume", "run=resumed", f"run.root={root}"), 0)
    assert before < BATCHES
    assert found(folder) == found(root / "undisturbed")
    steps = [row["step"] for row in rundir.read_lines(folder / "metrics.jsonl")]
    assert steps == list(range(1, BATCHES + 1))


def test_a_gap_in_the_answers_is_computed_again() -> None:
    assert answered({}) == 0
    assert answered({1: {}, 2: {}, 3: {}}) == 3
    assert answered({1: {}, 3: {}, 4: {}}) == 1
    assert answered({2: {}}) == 0


def test_the_result_is_the_mean_over_targets_of_each_set() -> None:
    rows = {1: (30.0, 10.0), 2: (2.0, 6.0), 3: (8.0, 2.0)}
    named = {step: {"loss_sum": loss_sum, "targets": targets} for step, (loss_sum, targets) in rows.items()}
    found = by_set(named, {"held_out": 2, "other": 1})
    assert found == {"held_out": {"loss": 2.0, "targets": 16.0}, "other": {"loss": 4.0, "targets": 2.0}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of them"),
        (["run=trained", "weights=/tmp"], "give one of them"),
        (["weights=/nowhere"], "no such folder"),
        (["run=trained", "step=7"], "no such checkpoint; allowed"),
        (["run=trained", "step=x"], "must be a whole number"),
        (["run=trained", "model.width=32"], "evaluate.weights"),
        (["run=undisturbed"], "has no weights of its own"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(root: Path, arguments: list[str], said: str) -> None:
    before = sorted(root.iterdir())
    process = launch("evaluate", *arguments, f"run.root={root}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1), err
    assert said in err
    assert sorted(root.iterdir()) == before


def guard(action: str, budget: int) -> Guard:
    return Guard(action=action, spike_sigmas=0.0, warmup=100, rollback_steps=1, budget=budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_the_budget_holds_whatever_is_done_about_a_bad_step(action: str) -> None:
    scattered = list(range(10, 100, 10))  # nine, never two in a row
    assert over_budget(guard(action, 9), scattered) is None
    assert isinstance(over_budget(guard(action, 8), scattered), Stop)
    assert isinstance(decide_rewind(guard(action, 8), BadStep(90, (), ()), scattered), Stop)


def test_only_the_last_hundred_steps_count() -> None:
    assert over_budget(guard("skip", 1), [1, 101]) is None
    assert isinstance(over_budget(guard("skip", 1), [2, 101]), Stop)


def test_the_first_of_the_bad_steps_in_a_row_is_blamed() -> None:
    bad = [BadStep(step, (), ()) for step in (117, 145, 146, 147)]
    assert since_last_good(bad).step == 145
    assert decide_rewind(guard("skip", 9), since_last_good(bad), [117, 145, 146, 147]) == GoBack(144, False)


def test_a_slow_step_is_forgotten_after_a_hundred_more() -> None:
    pace = Pace()
    assert deadline_of(pace, "run", 600.0, 60.0, 10) == 600.0
    learn(pace, "run", [60.0, *[0.1] * (RECENT - 1)])
    assert deadline_of(pace, "run", 600.0, 60.0, 10) > 600.0
    learn(pace, "run", [0.1])
    assert deadline_of(pace, "run", 600.0, 60.0, 10) < 70.0
    assert deadline_of(pace, "evaluate", 2400.0, 60.0, 1) == 2400.0  # each kind by itself
