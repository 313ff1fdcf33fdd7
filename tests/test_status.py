"""launch.status: what it calls a run, told from the run directory alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.status import detail, line, state
from orchestrator.record import rundir
from tests.test_rundir import fabricate


def happened(folder: Path, *events: str, **last: Any) -> None:
    """Events as the controller writes them; `last` adds to the last one."""
    file = rundir.Appender(folder / "events.jsonl")
    for number, event in enumerate(events):
        row = {"time": 1000.0 + number, "event": event, "attempt": 1, "step": number}
        file.write(row | (last if number == len(events) - 1 else {}))


@pytest.mark.parametrize(
    ("events", "last", "expected"),
    [
        (["start", "commit", "finish"], {}, "finished"),
        (["start", "stop"], {}, "stopped"),
        (["start", "stop"], {"at_once": True}, "stopped"),
        (["start", "failure", "decision"], {"decision": "GiveUp"}, "gave up"),
        (["reserve", "give_up"], {}, "gave up"),
        (["start", "failure", "decision"], {"decision": "Restart"}, "died"),
        (["start", "commit"], {}, "died"),
        (["start", "finish", "reserve", "start"], {}, "died"),
        ([], {}, "died"),
    ],
)
def test_the_last_event_tells_how_a_run_ended(
    tmp_path: Path, events: list[str], last: dict[str, Any], expected: str
) -> None:
    happened(tmp_path, *events, **last)
    assert state(tmp_path) == expected


@pytest.mark.parametrize("events", [[], ["start"], ["finish"]])
def test_a_run_with_a_living_controller_is_running(tmp_path: Path, events: list[str]) -> None:
    happened(tmp_path, *events)
    held = rundir.lock(tmp_path)
    assert state(tmp_path) == "running"
    held.close()
    assert state(tmp_path) != "running"


def test_a_line_tells_step_loss_and_goodput(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, "some")
    assert line(folder)[:5] == ["some", "died", "0/400", "-", "-"]
    file = rundir.Appender(folder / "metrics.jsonl")
    for step, loss in ((1, 5.0), (2, 4.0), (2, 3.5)):
        file.write({"step": step, "loss": loss})
    rundir.write_json(folder / "goodput.json", {"wall_s": 10.0, "goodput": 0.75, "restarts": 0, "buckets": {}})
    happened(folder, "finish")
    assert line(folder)[:5] == ["some", "finished", "2/400", "3.5000", "75.0%"]


def test_one_run_s_detail_tells_where_its_time_went_and_what_happened(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, "some", done=20)
    found = {"wall_s": 12.0, "goodput": 0.5, "restarts": 3, "buckets": {"step": 6.0, "compile": 8.0, "save": 0.0}}
    (folder / "goodput.json").write_text(json.dumps(found))
    happened(folder, "start", "failure", outcome="host died")
    text = detail(folder)
    assert "wall 12.0 s, restarts 3" in text
    assert text.index("compile") < text.index("step ")
    assert "save" not in text
    assert "checkpoints at steps [20]" in text
    assert "outcome=host died" in text


def test_a_host_in_quarantine_is_named_however_long_ago_that_was(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, "some", done=20)
    happened(folder, "unfit", host="10.0.0.2", slice="a", worker=3, node="f00", why="chip 1 multiplies wrong")
    happened(folder, *["save"] * 50)
    assert "quarantined: host 10.0.0.2 (worker 3 of a): chip 1 multiplies wrong" in detail(folder)


def test_a_server_shows_tokens_and_not_a_loss(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, "serving")
    manifest = rundir.read_manifest(folder)
    rundir.write_manifest(folder, replace(manifest, config=manifest.config | {"serve": {"name": "gemma-2"}}))
    (folder / "metrics.jsonl").write_text('{"step": 7, "attempt": 1, "time": 1.0, "tokens_per_s": 950.5}\n')
    assert line(folder)[2:4] == ["-", "950 tokens/s"]
