"""What the controller makes of saves: only what is on disk is announced, what failed is tried again, not too often."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma.config import ConfigError
from gemma.messages import SaveFailed
from orchestrator.config import with_id
from orchestrator.programs import saves
from orchestrator.programs.saves import Saves
from orchestrator.programs.window import LONGEST_BACKOFF_S, backoff_s, warned
from orchestrator.record import rundir
from orchestrator.record.report import Report
from orchestrator.record.rundir import Appender
from tests.runs import TOP
from tests.test_config import config_of


@pytest.fixture
def report(tmp_path: Path) -> Report:
    made = Report(with_id(config_of("wandb.mode=disabled"), "some", str(tmp_path)), tmp_path, time.monotonic())
    made.screen.console.file = io.StringIO()
    return made


def said(report: Report) -> str:
    file = report.screen.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def commit(report: Report, step: int) -> None:
    (report.folder / "checkpoints" / str(step)).mkdir(parents=True)


def told(report: Report) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in rundir.events(report.folder)]


def test_a_failed_save_goes_back_to_what_is_on_disk_and_waits(report: Report) -> None:
    commit(report, 10)
    found = Saves(30, uncommitted={20: time.monotonic()})
    saves.note_failures(found, report, [None, SaveFailed(20, "full"), SaveFailed(20, "full")], [])
    assert (found.newest, found.failures, found.uncommitted) == (10, 1, {})
    assert 0 < found.again_at - time.monotonic() <= backoff_s(1)
    assert told(report) == [("save_failed", 20)]


def test_a_failure_does_not_forget_a_save_that_is_on_its_way(report: Report) -> None:
    found = Saves(30, uncommitted={20: time.monotonic()})
    saves.note_failures(found, report, [SaveFailed(20, "full")], [30])
    assert found.newest == 30


@pytest.mark.parametrize("failed", [SaveFailed(20, "the old ones were not removed"), SaveFailed(15, "told before")])
def test_a_save_that_is_on_disk_or_was_told_has_not_failed(report: Report, failed: SaveFailed) -> None:
    commit(report, 20)
    found = Saves(20, uncommitted={20: time.monotonic()})
    saves.note_failures(found, report, [failed], [])
    saves.announce_commits(found, report, [], 60.0)
    assert told(report) == [("commit", 20)]
    assert found.failures == 0


def test_a_commit_ends_the_waiting(report: Report) -> None:
    found = Saves(0)
    saves.fail(found, report, 10, "full", [])
    found.uncommitted[20] = time.monotonic()
    commit(report, 20)
    saves.announce_commits(found, report, [], 60.0)
    assert (found.failures, found.again_at) == (0, 0.0)
    assert "step 20 is saved; 1 tries before had failed" in said(report)


def test_a_save_that_nobody_hears_of_again_has_failed(report: Report) -> None:
    found = Saves(10, uncommitted={10: time.monotonic() - 61})
    saves.announce_commits(found, report, [], 60.0)
    assert (found.newest, found.failures) == (0, 1)
    assert told(report) == [("save_failed", 10)]


def test_a_save_that_was_removed_for_a_later_one_has_not_failed(report: Report) -> None:
    commit(report, 20)
    found = Saves(20, uncommitted={10: time.monotonic() - 61, 20: time.monotonic()})
    saves.announce_commits(found, report, [], 60.0)
    assert told(report) == [("commit", 20)]


def test_the_wait_doubles_up_to_a_limit_and_so_do_the_failures_between_two_warnings(report: Report) -> None:
    assert [backoff_s(failures) for failures in (1, 2, 3, 4)] == [5.0, 10.0, 20.0, 40.0]
    assert backoff_s(10_000) == LONGEST_BACKOFF_S == 300.0
    assert [failures for failures in range(1, 40) if warned(failures)] == [1, 2, 4, 8, 16, 32]
    found = Saves(0)
    for _ in range(9):
        saves.fail(found, report, 10, "full", [])
    assert said(report).count("WARNING") == 4


LINES_ON_A_FULL_DISK = """
import resource, sys, pathlib
from orchestrator.record import rundir
path = pathlib.Path(sys.argv[1])
file = rundir.Appender(path)
whole = [{"n": n, "text": "x" * 50} for n in range(9)]
for row in whole[:3]:
    file.write(row)
no = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, no))  # a third of a line fits
for row in whole[3:6]:
    file.write(row)
assert path.read_text().endswith("}\\n"), "torn"
assert len(list(rundir.read_lines(path))) == 3
assert file.problem == "lines.jsonl: File too large", file.problem
resource.setrlimit(resource.RLIMIT_FSIZE, (no, no))
for row in whole[6:]:
    file.write(row)
assert file.problem is None
assert list(rundir.read_lines(path)) == whole
"""


def test_lines_that_a_full_disk_refuses_are_written_later_whole_and_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LINES_ON_A_FULL_DISK, str(tmp_path / "lines.jsonl")]
    subprocess.run(command, cwd=TOP, check=True)


def test_of_too_many_unwritten_lines_the_oldest_are_lost_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "KEPT_LINES", 3)
    Path(tmp_path / "full.jsonl").symlink_to("/dev/full")
    file = Appender(tmp_path / "full.jsonl")
    for n in range(5):
        file.write({"n": n})
    assert [bytes(line) for line in file.waiting] == [b'{"n": 2}\n', b'{"n": 3}\n', b'{"n": 4}\n']
    assert (file.lost, file.problem) == (2, "full.jsonl: No space left on device")


def test_a_disk_that_takes_nothing_is_told_once_and_what_is_lost_at_the_end(tmp_path: Path, report: Report) -> None:
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    report.events_file = Appender(tmp_path / "full.jsonl")
    for _ in range(3):
        report.event("something")
    assert said(report).count("WARNING") == 1
    report.close()
    assert said(report).count("WARNING") == 2
    assert "WARNING: 3 lines of" in said(report)


def test_a_host_whose_log_is_on_a_full_disk_prints_on() -> None:
    code = "from orchestrator.hosts import worker; worker.redirect('/dev/full'); print('x' * 100_000, flush=True)"
    code += "; assert worker.caught(int, 'x').exception == 'ValueError'"
    subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True)


def test_a_run_that_cannot_write_its_manifest_is_refused_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.record import manifest

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    found = manifest.new(with_id(config_of(), "some", str(tmp_path)), [])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=rf"cannot write {tmp_path}/manifest.json \(No space left on device\)"):
        rundir.write_manifest(tmp_path, found)
