"""wandb, really run offline: one value a step in its own record, and nothing that happens to it reaches the run."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import wandb

from orchestrator.config import Config, with_id
from orchestrator.record import rundir, wandb_log
from orchestrator.record.wandb_log import WandbLog
from tests import wandb_spool
from tests.test_config import config_of
from tests.test_rundir import fabricate

ROWS = 500
BLOCK = wandb_spool.BLOCK_BYTES


def config(mode: str = "offline") -> Config:
    return with_id(config_of(f"wandb.mode={mode}"), "some", "runs")


def session(folder: Path, steps: Iterable[int]) -> list[str]:
    """One controller's life with wandb; returns what it warned of."""
    warned: list[str] = []
    log = WandbLog(config(), folder, warned.append)
    for step in steps:
        log.log({"step": step, "loss": float(step), **{f"filler_{n:02}": 1.0 / (step + n + 1) for n in range(12)}})
    log.finish()
    return warned


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of one session, never changed."""
    folder = tmp_path_factory.mktemp("spool")
    assert session(folder, range(1, ROWS + 1)) == []
    return folder


@pytest.fixture
def copied(spool: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spool, tmp_path / "run", symlinks=True))


def record(folder: Path) -> Path:
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_every_row_is_read_also_across_block_boundaries(spool: Path) -> None:
    assert record(spool).stat().st_size > 200_000 > 6 * BLOCK
    rows = [row for row in wandb_spool.history(spool) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, ROWS + 1))
    assert all(row["loss"] == row["step"] and row["filler_11"] == 1.0 / (row["step"] + 12) for row in rows)


@pytest.mark.parametrize("room", range(9))
def test_a_record_that_ends_just_before_a_block_does_is_followed_by_the_next(tmp_path: Path, room: int) -> None:
    def piece(kind: int, data: bytes) -> bytes:
        return bytes(4) + len(data).to_bytes(2, "little") + bytes([kind]) + data

    header = wandb_spool.RECORD_HEADER_BYTES
    first, second = b"a" * (BLOCK - wandb_spool.HEADER_BYTES - header - room), b"b" * 100
    written = bytes(wandb_spool.HEADER_BYTES) + piece(wandb_spool.FULL, first)
    if room < header:  # no place for a header: padding
        written += bytes(room) + piece(wandb_spool.FULL, second)
    else:
        here = room - header
        written += piece(wandb_spool.FIRST, second[:here]) + piece(wandb_spool.LAST, second[here:])
    (tmp_path / "some.wandb").write_bytes(written)
    assert list(wandb_spool.records(tmp_path / "some.wandb")) == [first, second]


@pytest.mark.parametrize("cut", [1, 5, 1000, 3 * BLOCK, 100_001, 200_000])
def test_a_torn_end_costs_only_the_rows_behind_it(copied: Path, cut: int) -> None:
    path = record(copied)
    os.truncate(path, path.stat().st_size - cut)
    found = [row["step"] for row in wandb_spool.history(copied) if "loss" in row]
    assert found == list(range(1, len(found) + 1))
    assert len(found) > ROWS - 1 - cut / 300


def test_steps_done_again_after_a_kill_stand_once_in_wandb_s_record(copied: Path) -> None:
    path = record(copied)
    os.truncate(path, path.stat().st_size - 20_000)
    file = rundir.Appender(copied / "metrics.jsonl")
    for step in range(1, ROWS + 1):
        file.write({"step": step, "loss": float(step)})
    assert session(copied, range(301, ROWS + 21)) == []
    record(copied)  # one file, complete
    found = [row["step"] for row in wandb_spool.history(copied) if "loss" in row]
    assert found == list(range(1, ROWS + 21))


def test_steps_done_again_in_one_controller_s_life_stand_once_in_wandb_s_record(tmp_path: Path) -> None:
    assert session(tmp_path, [*range(1, 11), *range(6, 16)]) == []
    assert [row["step"] for row in wandb_spool.history(tmp_path)] == list(range(1, 16))


def test_steps_that_only_metrics_jsonl_holds_reach_wandb_with_the_next_session(tmp_path: Path) -> None:
    file = rundir.Appender(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 2, 3, 4):
        file.write({"step": step, "loss": float(step)})
    assert session(tmp_path, range(3, 7)) == []
    assert [row["step"] for row in wandb_spool.history(tmp_path)] == list(range(1, 7))


def test_whatever_was_resumed_one_file_holds_the_whole_history(tmp_path: Path) -> None:
    """Evals as well, and a loss that was not finite."""
    metrics, events = (rundir.Appender(tmp_path / name) for name in ("metrics.jsonl", "events.jsonl"))
    for first in (1, 11, 21):
        assert session(tmp_path, range(first, first + 10)) == []
        for step in range(first, first + 10):
            metrics.write({"step": step, "loss": None if step == 5 else float(step)})
        events.write({"event": "eval", "time": 1.0, "step": first + 9, "loss": 2.0, "bits_per_byte": 3.0})
    assert session(tmp_path, ()) == []  # nothing to log: wandb is not started
    assert session(tmp_path, [31]) == []
    record(tmp_path)
    rows = list(wandb_spool.history(tmp_path))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 32))
    assert [row["eval/step"] for row in rows if "eval/loss" in row] == [10, 20, 30]


def test_an_agent_s_id_is_kept_and_a_resume_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fabricate(tmp_path, "some")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    assert session(folder, [1]) == []
    used = rundir.read_manifest(folder).wandb_id
    manifest = rundir.read_manifest(folder)
    rundir.write_manifest(folder, replace(manifest, attempts=[*manifest.attempts, manifest.attempts[0]]))
    monkeypatch.setenv("WANDB_SWEEP_ID", "another")
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    assert session(folder, [2]) == []
    assert used == "agents"
    assert rundir.read_manifest(folder).wandb_id == "agents"
    assert record(folder).stem == "run-agents"


def test_the_step_is_an_axis_of_its_own(spool: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    axes = {}
    for data in wandb_spool.records(record(spool)):
        found = wandb_internal_pb2.Record()
        found.ParseFromString(data)
        if found.WhichOneof("record_type") == "metric":
            axes[found.metric.name or found.metric.glob_name] = found.metric.step_metric
    assert axes == {"step": "", "*": "step", "eval/step": "", "eval/*": "eval/step"}


def raises(error: BaseException) -> Callable[..., NoReturn]:
    def init(**_: Any) -> NoReturn:
        raise error

    return init


@pytest.mark.parametrize("error", [RuntimeError("quota"), SystemExit(1), KeyboardInterrupt()])
def test_a_wandb_that_fails_warns_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(wandb, "init", raises(error))
    warned: list[str] = []
    log = WandbLog(config(), tmp_path, warned.append)
    started = time.monotonic()
    for step in range(2000):
        log.log({"step": step, "loss": 1.0})
    assert time.monotonic() - started < 2.0
    log.finish()
    log.log({"step": 2000, "loss": 1.0})
    assert len(warned) == 1
    assert type(error).__name__ in warned[0]


@pytest.mark.parametrize("extra", [-1, 0, 5])
def test_a_wandb_that_hangs_stops_neither_the_run_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    freed = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: freed.wait(60))
    monkeypatch.setattr(wandb_log, "FINISH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(wandb_log, "QUEUE_ROWS", 50)
    warned: list[str] = []
    log = WandbLog(config(), tmp_path, warned.append)

    def run() -> None:
        for step in range(50 + extra):
            log.log({"step": step, "loss": 1.0})
        log.finish()

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(5.0)
    over = not running.is_alive()
    freed.set()
    assert over
    assert len(warned) == 1


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    log = WandbLog(config("disabled"), tmp_path, pytest.fail)
    log.log({"step": 1, "loss": 1.0})
    log.finish()
    assert log.thread is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("asked", "env", "netrc", "expected"),
    [
        ("auto", {}, None, "offline"),
        ("auto", {}, "machine example.org login a password b", "offline"),
        ("auto", {}, "machine api.wandb.ai login user password b", "online"),
        ("auto", {"WANDB_API_KEY": "k"}, None, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
        ("online", {}, None, "online"),
        ("offline", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, None, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, None, "disabled"),
    ],
)
def test_auto_is_online_only_where_there_is_a_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    env: dict[str, str],
    netrc: str | None,
    expected: str,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
    assert wandb_log.mode(config(asked)) == expected
