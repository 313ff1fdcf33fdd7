"""The run directory: torn files are read, names do not decide, one controller at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma.config import ConfigError
from orchestrator.config import with_id
from orchestrator.interrupt import Interrupt
from orchestrator.record import manifest, rundir
from tests.test_config import config_of

TOP = Path(__file__).parents[1]


def fabricate(root: Path, run_id: str, *overrides: str, done: int = 0, created: float | None = None) -> Path:
    """A run directory as a controller leaves it after `done` steps."""
    config = with_id(config_of(*overrides), run_id, str(root))
    folder = rundir.create(str(root), run_id)
    found = manifest.new(config, list(overrides))
    if created is not None:
        found = rundir.Manifest(**(vars(found) | {"created": created}))
    rundir.write_manifest(folder, found)
    if done:
        (folder / "checkpoints" / str(done)).mkdir(parents=True)
    return folder


@pytest.mark.parametrize(("done", "kept"), [(200, True), (0, False)])
def test_a_mistake_seen_on_a_host_takes_a_fresh_run_away_but_never_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, kept: bool
) -> None:
    from orchestrator import run

    def run_on_cluster(*_: object) -> None:
        raise ConfigError("data.path: the hosts do not see the same text")

    monkeypatch.setattr(run, "run_on_cluster", run_on_cluster)
    folder = fabricate(tmp_path, "some", "wandb.mode=disabled", done=done)
    config = with_id(config_of("wandb.mode=disabled"), "some", str(tmp_path))
    with Interrupt() as interrupt, pytest.raises(ConfigError, match=r"^data.path: "):
        run.run(config, folder, rundir.lock(folder), interrupt, time.monotonic())
    assert folder.exists() is kept
    assert rundir.committed(folder) == [done] * kept


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 1.0}'])
def test_a_torn_last_line_is_passed_over_and_writing_goes_on_behind_it(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    whole = [1, 2] + [3] * torn.endswith("}")
    assert [row["step"] for row in rundir.read_lines(path)] == whole
    rundir.Appender(path).write({"step": 4})
    assert [row["step"] for row in rundir.read_lines(path)] == [*whole, 4]


def test_an_appender_adds_whole_lines_to_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for n in range(3):
        rundir.Appender(path).write({"n": n})
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'


def test_metrics_keeps_the_last_row_of_a_step(tmp_path: Path) -> None:
    file = rundir.Appender(tmp_path / "metrics.jsonl")
    for attempt, step in [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4)]:
        file.write({"step": step, "attempt": attempt})
    assert {step: row["attempt"] for step, row in rundir.metrics(tmp_path).items()} == {1: 1, 2: 2, 3: 2, 4: 2}


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert (rundir.metrics(tmp_path), rundir.events(tmp_path), rundir.committed(tmp_path)) == ({}, [], [])


def test_only_whole_checkpoints_count_and_in_number_order(tmp_path: Path) -> None:
    for name in ("100", "20", "30.orbax-checkpoint-tmp", "away-40"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert rundir.committed(tmp_path) == [20, 100]


def test_latest_is_the_newest_by_its_manifest_not_by_its_name(tmp_path: Path) -> None:
    for run_id, created in (("m-new", 300.0), ("z-old", 100.0), ("a-middle", 200.0)):
        fabricate(tmp_path, run_id, created=created)
    assert rundir.find(str(tmp_path), "latest").name == "m-new"
    assert [folder.name for folder in rundir.runs(str(tmp_path))] == ["z-old", "a-middle", "m-new"]
    assert rundir.find(str(tmp_path), "z-old").name == "z-old"


def test_an_unknown_run_is_refused_with_the_newest_there_are(tmp_path: Path) -> None:
    fabricate(tmp_path, "known")
    with pytest.raises(ConfigError, match=r"run=other: no such run in run.root=.*; the newest are known"):
        rundir.find(str(tmp_path), "other")


def test_a_broken_manifest_is_refused_by_name(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, "torn")
    for text in ("", "{", "[]", '{"id": "torn"}', '{"attempts": []}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ConfigError, match=r"run=torn: .*manifest\.json is not a manifest"):
            rundir.read_manifest(folder)


def test_a_broken_run_does_not_hide_its_neighbours(tmp_path: Path) -> None:
    good, torn = fabricate(tmp_path, "good"), fabricate(tmp_path, "torn")
    (torn / "manifest.json").write_text("{")
    assert rundir.find(str(tmp_path), "good") == good


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found = manifest.new(with_id(config_of("profile.steps=[3,5]"), "some", str(tmp_path)), ["train.steps=3"])
    rundir.write_manifest(tmp_path, found)
    back = rundir.read_manifest(tmp_path)
    # JSON has no tuples; everything else is equal.
    assert json.dumps(vars(back), default=vars) == json.dumps(vars(found), default=vars)
    assert back.attempts == found.attempts


def test_write_json_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    rundir.write_json(path, {"n": 1})
    reader = open(path)  # noqa: SIM115 - open across the second write, as a reader may be
    rundir.write_json(path, {"n": 2})
    with pytest.raises(TypeError):
        rundir.write_json(path, {"n": object()})
    with reader:
        assert json.load(reader) == {"n": 1}
    assert json.loads(path.read_text()) == {"n": 2}
    assert os.listdir(tmp_path) == ["goodput.json"]


def test_a_run_id_is_taken_once(tmp_path: Path) -> None:
    rundir.create(str(tmp_path), "one")
    with pytest.raises(ConfigError, match=r"run.id=one: exists in .*launch.resume run=one"):
        rundir.create(str(tmp_path), "one")


def test_the_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from orchestrator.record import rundir;"
        "held = rundir.lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=TOP, stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert rundir.is_locked(tmp_path)
        with pytest.raises(ConfigError, match=f"is being driven by process {holder.pid};"):
            rundir.lock(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert not rundir.is_locked(tmp_path)
    rundir.lock(tmp_path).close()


def test_looking_whether_a_run_is_driven_does_not_take_its_lock(tmp_path: Path) -> None:
    rundir.lock(tmp_path).close()
    assert not rundir.is_locked(tmp_path)
    held = rundir.lock(tmp_path)
    assert rundir.is_locked(tmp_path)
    held.close()


def test_a_run_s_name_begins_with_its_time(tmp_path: Path) -> None:
    name = rundir.new_id("tiny.v2")
    assert name.startswith(time.strftime("%Y%m%d-"))
    assert with_id(config_of(), name, "runs").run.id == name


def fingerprinted(folder: Path, *prints: str) -> None:
    for name in prints:
        rundir.Appender(folder / "events.jsonl").write({"event": "restore", "fingerprint": name})


@pytest.mark.parametrize(
    ("before", "now", "allowed", "told"),
    [
        ([], {"a"}, False, None),
        (["a"], {"a"}, False, None),
        (["a"], {"b"}, False, "allow_data_change=true"),
        (["a"], {"b"}, True, None),
        (["a", "b"], {"b"}, False, None),
        (["a"], {"a", "b"}, True, "the hosts do not see the same text"),
    ],
)
def test_a_run_goes_on_with_the_text_it_began_with(
    tmp_path: Path, before: list[str], now: set[str], allowed: bool, told: str | None
) -> None:
    from orchestrator.recovery.recover import same_text

    fingerprinted(tmp_path, *before)
    if told is None:
        same_text(tmp_path, now, allowed)
    else:
        with pytest.raises(ConfigError, match=told):
            same_text(tmp_path, now, allowed)


@pytest.mark.parametrize(
    ("committed", "reported", "step"),
    [([], 3, None), ([10, 20], 25, 20), ([10, 20], 20, 20), ([10, 20], 18, 10), ([20], 18, 20)],
)
def test_no_step_is_left_without_its_line_where_a_checkpoint_is_ahead_of_the_controller(
    tmp_path: Path, committed: list[int], reported: int, step: int | None
) -> None:
    from orchestrator.recovery.recover import newest_checkpoint

    for done in committed:
        (tmp_path / "checkpoints" / str(done)).mkdir(parents=True)
    rundir.Appender(tmp_path / "metrics.jsonl").write({"step": reported, "attempt": 1})
    rundir.Appender(tmp_path / "events.jsonl").write({"event": "start", "attempt": 1, "step": 0})
    assert newest_checkpoint(tmp_path) == step
