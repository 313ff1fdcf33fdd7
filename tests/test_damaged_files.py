"""A run directory whose small files are damaged: every command goes on, or says in one line which file it is."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemma.config import ConfigError
from gemma.digest import seal
from gemma.text import order as orders
from launch import logs, report, resume, status
from orchestrator import config as configs
from orchestrator.record import jsonfile, rundir
from orchestrator.record.report import Report
from orchestrator.recovery import recover
from tests.test_config import config_of
from tests.test_rundir import fabricate

STEPS = 20
LINES = ("metrics.jsonl", "events.jsonl")
DAMAGES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"step": 3, "lo',
    "not UTF-8": b'{"step": 1, "event": "\xff", "loss": 2.0}\n',
    "no object": b'5\nnull\n[]\n"x"\n',
    "nothing in it": b"{}\n",
    "NaN": b'{"step": 1, "time": NaN, "attempt": 1, "event": "eval", "loss": NaN, "goodput": NaN,'
    b' "buckets": {"step": NaN}}\n',
    "mistyped": b'{"step": "1", "time": [], "attempt": {}, "event": 7, "loss": "low", "goodput": "x", "buckets": [3],'
    b' "incidents": [4, {}], "restarts": "many", "wall_s": null}\n',
    "keys missing": b'{"time": 1.0, "event": "eval"}\n{"time": 1.0, "attempt": 1, "step": 1, "event": "unfit"}\n'
    b'{"time": 1.0, "attempt": 1, "step": 1, "event": "skip_batch"}\n',
    "out of range": b'{"step": 1' + b"0" * 400 + b', "time": 1e400, "attempt": -1, "event": "eval", "loss": 1e999}\n',
    "too many digits": b'{"step": ' + b"1" * 5000 + b', "event": "eval"}\n',
    "deep": b"[" * 100_000 + b"\n",
    "deep object": b'{"step": ' * 100_000 + b"\n",
    "surrogate": b'{"step": 2, "time": 1.0, "attempt": 1, "event": "phase", "name": "\\ud83d", "loss": 1.0}\n',
    "NUL bytes": bytes(4096),
}


def sound(root: Path, run_id: str) -> Path:
    """A run of which the controller died at its last step but one."""
    overrides = [f"train.steps={2 * STEPS}", "wandb.mode=disabled"]
    folder = fabricate(root, run_id, *overrides, done=STEPS)
    metrics, events = (rundir.Appender(folder / name) for name in LINES)
    for step in range(1, STEPS + 1):
        metrics.write(
            {"step": step, "attempt": 1, "loss": 3.0, "bits_per_byte": 2.0, "time": time.time(), "step_s": 1.0}
        )
    for event in ("phase", "commit"):
        events.write({"time": time.time(), "event": event, "attempt": 1, "step": STEPS, "name": "step"})
    goodput = {"wall_s": 9.0, "goodput": 0.5, "restarts": 1, "buckets": {"step": 4.5}, "incidents": []}
    rundir.write_json(folder / "goodput.json", goodput)
    (folder / "logs" / "attempt-1-host-0.log").write_text("printed\n")
    return folder


def damaged(path: Path, damage: str, how: str) -> None:
    """how: the damage is all there is, or lies amid sound lines."""
    lines, bad = path.read_bytes().splitlines(keepends=True), DAMAGES[damage]
    bad += b"\n" * (how == "amid" and not bad.endswith(b"\n"))
    path.write_bytes(bad if how == "instead" else b"".join([*lines[:1], bad, *lines[1:]]))


CASES = [
    (name, damage, how)
    for name in (*LINES, "goodput.json")
    for damage in DAMAGES
    for how in ("instead", "amid")
    if name in LINES or how == "instead"
]


@pytest.fixture(autouse=True)
def _nothing_warned() -> None:
    jsonfile.warned.clear()


def command(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    return int(module.work())


@pytest.mark.parametrize(("name", "damage", "how"), CASES)
def test_every_command_goes_on_whatever_a_small_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, damage: str, how: str
) -> None:
    root = f"run.root={tmp_path}"
    folder = sound(tmp_path, "hurt")
    damaged(folder / name, damage, how)
    sound(tmp_path, "well")
    assert command(status, monkeypatch, root) == 0
    shown = capfd.readouterr().out.splitlines()[1:]
    assert sorted(line.split()[0] for line in shown) == ["hurt", "well"]
    assert f"{STEPS}/{2 * STEPS}" in next(line for line in shown if line.startswith("well"))
    for module in (status, report, logs):
        assert command(module, monkeypatch, root, "run=hurt") == 0
    assert "printed" in capfd.readouterr().out
    # What a resumed controller reads: up to here no process is started.
    config = configs.with_id(config_of(f"train.steps={2 * STEPS}", "wandb.mode=disabled"), "hurt", str(tmp_path))
    resumed = Report(config, folder, time.monotonic())
    assert recover.newest_checkpoint(folder) == STEPS
    orders.recorded(rundir.events(folder), 0, 8)
    resumed.event("phase")
    resumed.close()
    assert rundir.goodput(folder) is not None
    assert rundir.events(folder)[-1]["event"] == "phase"
    if how == "amid":
        assert len(rundir.metrics(folder)) >= STEPS - 1


@pytest.mark.parametrize("name", [*LINES, "goodput.json"])
def test_a_damaged_file_is_named_once(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    folder = sound(tmp_path, "hurt")
    damaged(folder / name, "not UTF-8", "instead")
    for _ in range(3):
        rundir.metrics(folder), rundir.events(folder), rundir.goodput(folder)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {folder / name}: ")


@pytest.mark.parametrize(
    "text",
    [
        *DAMAGES.values(),
        b'{"id": 5, "created": "x"}',
        b"created=[]",
        b"attempts=5",
        b"config=3",
        b"config=" + json.dumps(seal({"train": {"steps": "x"}, "run": {}, "model": {}, "cluster": {}})).encode(),
        b'config={"train": {"steps": 5}, "run": {}, "model": {}, "cluster": {}}',  # without its digest
    ],
)
def test_a_damaged_manifest_is_named_in_one_line_and_hides_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text: bytes
) -> None:
    folder, root = sound(tmp_path, "hurt"), f"run.root={tmp_path}"
    sound(tmp_path, "well")
    key, equals, value = text.partition(b"=")
    if equals:
        found = json.loads((folder / "manifest.json").read_bytes())
        text = json.dumps(found | {key.decode(): json.loads(value)}).encode()
    (folder / "manifest.json").write_bytes(text)
    assert command(status, monkeypatch, root) == 0
    out, err = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["run", "well"]
    assert str(folder / "manifest.json") in err
    for module in (status, report, logs, resume):
        with pytest.raises(ConfigError, match=r"^run=hurt: .*manifest\.json is not a manifest") as raised:
            command(module, monkeypatch, root, "run=hurt")
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 600


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    row = {"step": 1, "loss": float("nan"), "more": [float("inf"), {"low": -float("inf")}], "ok": 1.5}
    rundir.Appender(tmp_path / "metrics.jsonl").write(row)
    rundir.write_json(tmp_path / "goodput.json", row)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name in ("metrics.jsonl", "goodput.json"):
        found = json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        assert found == {"step": 1, "loss": None, "more": [None, {"low": None}], "ok": 1.5}


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after the rename must not find an empty file: the order of the system's calls is what shows it."""
    calls: list[str] = []
    fsync, rename = jsonfile.os.fsync, Path.rename
    monkeypatch.setattr(jsonfile.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (calls.append("rename"), rename(self, to))[1])
    rundir.write_json(tmp_path / "goodput.json", {"n": 1})
    assert calls == ["fsync", "rename", "fsync"]
