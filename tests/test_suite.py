"""A suite as a user starts it: the same scores whatever happens, nothing answered twice, and what is refused."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import rundir
from tests.runs import finish, kill_worker, launch, losses, wait_for

SMALL = ["evaluate.limit=12", "evaluate.block=256", "wandb.mode=disabled"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a short run lies."""
    root = tmp_path_factory.mktemp("runs")
    small = ["train.steps=10", "checkpoint.every=10", "eval.every=0", "optim.warmup_steps=5", "wandb.mode=disabled"]
    finish(launch("train", f"run.root={root}", "run.id=trained", "cluster.slice=v5p-8", "mesh.fsdp=4", *small), 0)
    return root


def begun(root: Path, name: str, *more: str) -> Any:
    return launch("evaluate", "run=trained", f"run.root={root}", f"run.id={name}", "suite=quick", *SMALL, *more)


def answered(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "digest" not in line]


def results(folder: Path) -> bytes:
    """But for its name."""
    found = json.loads((folder / "results.json").read_text())
    return json.dumps(found | {"run": ""}, sort_keys=True).encode()


def samples(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "samples").iterdir())}


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """One host, nothing happened."""
    shown = finish(begun(root, "alone"), 0)
    assert "PIQA" in shown
    assert "examples" in shown
    return root / "alone"


def test_a_suite_ends_with_a_table_results_samples_and_a_page(alone: Path) -> None:
    found = json.loads((alone / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["piqa", "boolq", "arc_easy", "gsm8k"]
    assert all(row["state"] == "done" and row["documents"] == 12 for row in found["rows"])
    assert found["examples"] is True
    assert all(row["low"] <= row["value"] <= row["high"] for row in found["rows"])
    first = json.loads(samples(alone)["piqa.jsonl"].splitlines()[0])
    assert {"prompt", "answer", "target", "score", "choices"} <= first.keys()
    assert "PIQA" in (alone / "evaluation.html").read_text()


def test_two_hosts_give_the_same_bits(root: Path, alone: Path) -> None:
    finish(begun(root, "hosts", "cluster.slice=v5p-16", "mesh.fsdp=8"), 0)
    assert results(root / "hosts") == results(alone)
    assert samples(root / "hosts") == samples(alone)


def test_killed_hosts_cost_what_was_in_flight_and_nothing_is_asked_twice(root: Path, alone: Path) -> None:
    folder, process = root / "killed", begun(root, "killed")
    for count in (2, 6):
        wait_for(lambda count=count: lines(folder) > count, f"{count} answers", process)  # type: ignore[misc]
        wait_for(lambda: started(folder) > failed(folder), "hosts", process)
        kill_worker(folder, 0)
        wait_for(lambda: failed(folder) == started(folder), "the failure to be seen", process)
    finish(process, 0)
    assert failed(folder) == 2
    assert results(folder) == results(alone)
    assert samples(folder) == samples(alone)
    names = [(row.get("block"), row.get("text")) for row in answered(folder)]
    assert len(names) == len(set(names))


def lines(folder: Path) -> int:
    return len(answered(folder)) if (folder / "answers.jsonl").exists() else 0


def started(folder: Path) -> int:
    return len([e for e in rundir.events(folder) if e["event"] == "start"])


def failed(folder: Path) -> int:
    return len([e for e in rundir.events(folder) if e["event"] == "failure"])


def test_a_killed_controller_s_evaluation_goes_on_where_it_was(root: Path, alone: Path) -> None:
    folder, process = root / "resumed", begun(root, "resumed")
    wait_for(lambda: lines(folder) > 4, "some answers", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = lines(folder)
    finish(launch("resume", "run=resumed", f"run.root={root}"), 0)
    assert results(folder) == results(alone)
    names = [(row.get("block"), row.get("text")) for row in answered(folder)]
    assert len(names) == len(set(names))
    assert before < len(names)


def test_tasks_asked_while_training_change_no_loss_and_say_what_an_evaluation_says(root: Path) -> None:
    from orchestrator.evaluation.tasks import EXAMPLES

    small = ["train.steps=10", "checkpoint.every=10", "eval.every=5", "optim.warmup_steps=5", "wandb.mode=disabled"]
    asked = ["eval.tasks=[piqa,boolq]", "eval.limit=8", f"eval.data={EXAMPLES}"]
    finish(launch("train", f"run.root={root}", "run.id=asked", "cluster.slice=v5p-8", "mesh.fsdp=4", *small, *asked), 0)
    assert losses(root / "asked") == losses(root / "trained")
    told = {event["step"]: event["values"] for event in rundir.events(root / "asked") if event["event"] == "tasks"}
    assert told.keys() == {5, 10}
    assert rundir.goodput(root / "asked")["buckets"]["tasks"] > 0  # type: ignore[index]
    same = ["tasks=[piqa,boolq]", "evaluate.limit=8", f"evaluate.data={EXAMPLES}", "wandb.mode=disabled"]
    finish(launch("evaluate", "run=asked", f"run.root={root}", "run.id=again", *same), 0)
    rows = json.loads((root / "again" / "results.json").read_text())["rows"]
    assert {row["name"]: row["value"] for row in rows} == told[10]
    compared = finish(launch("report", "compare=[again,again,card]", f"run.root={root}"), 0)
    assert "PIQA" in compared


def test_a_row_without_data_says_so_and_the_others_go_on(root: Path, tmp_path: Path) -> None:
    from orchestrator.evaluation.tasks import EXAMPLES

    data = tmp_path / "data"
    data.mkdir()
    (data / "piqa").symlink_to(EXAMPLES / "piqa")
    command = ["tasks=[piqa,boolq,realtoxicity]", f"evaluate.data={data}", "evaluate.limit=4", "wandb.mode=disabled"]
    shown = finish(launch("evaluate", "run=trained", f"run.root={root}", "run.id=absent", *command), 0)
    states = {row["name"]: row["state"] for row in json.loads((root / "absent" / "results.json").read_text())["rows"]}
    assert states == {"piqa": "done", "boolq": "no data", "realtoxicity": "not run"}
    assert "no data" in shown


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["suite=cards"], "evaluate.suite=cards: there is no such suite; allowed are card, quality, safety, quick"),
        (["tasks=[pika]"], "evaluate.tasks=pika: there is no such row; allowed are mmlu,"),
        (["suite=quick", "evaluate.data=/none"], "evaluate.data=/none: no such folder"),
        (["suite=quick", "evaluate.limit=0"], "evaluate.limit=0: must be at least 1, or null"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(root: Path, overrides: list[str], said: str) -> None:
    process = launch("evaluate", "run=trained", f"run.root={root}", "run.id=refused", *overrides)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said in err
    assert "Traceback" not in err
    assert not (root / "refused").exists()
