"""launch.logs and launch.stop of a run that lies here."""

import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from gemma.config import ConfigError
from launch import logs, stop
from orchestrator.record import rundir
from tests.test_rundir import fabricate

TOP = Path(__file__).parents[1]
DEADLINE_S = 30.0
# Drives a run as a controller does, until it is told to stop.
DRIVER = """
import signal, sys
from pathlib import Path
from orchestrator.record import rundir
folder = Path(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
held = rundir.lock(folder)
print("driving", flush=True)
signal.sigwait({signal.SIGTERM})
if sys.argv[2] == "deaf":
    sys.stdin.read()
rundir.Appender(folder / "events.jsonl").write({"time": 0.0, "event": "stop", "attempt": 1, "step": 1})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fabricate(tmp_path, "some")


def drive(folder: Path, how: str = "willing") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(folder), how]
    process = subprocess.Popen(command, cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "driving\n"
    return process


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        stem = name.replace("_", "-")
        (folder / "logs" / (stem + (".txt" if stem.endswith("failure") else ".log"))).write_text(text)


def test_shown_are_the_hosts_of_the_newest_attempt_by_rank_and_the_stories(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = {f"attempt_10_host_{rank}": f"rank {rank}\n" for rank in (0, 2, 11)}
    write(folder, attempt_9_host_0="old\n", attempt_9_failure="why\n", **hosts)
    assert logs.show(folder, "", follow=False, lines=0) == 0
    order = ["attempt-10-host-0.log", "attempt-10-host-2.log", "attempt-10-host-11.log", "attempt-9-failure.txt"]
    out = capsys.readouterr().out
    assert [line[9:-4] for line in out.splitlines() if line.startswith("==>")] == order
    assert [line for line in out.splitlines() if not line.startswith("==>")] == ["rank 0", "rank 2", "rank 11", "why"]
    logs.show(folder, "2", follow=False, lines=0)
    assert capsys.readouterr().out == "==> logs/attempt-10-host-2.log <==\nrank 2\n"


def test_only_the_last_lines_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, attempt_1_host_0="one\ntwo\nthree\n")
    logs.show(folder, "", follow=False, lines=2)
    assert capsys.readouterr().out == "==> logs/attempt-1-host-0.log <==\ntwo\nthree\n"


def test_followed_is_what_comes_once_each_until_the_run_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = rundir.lock(folder)
    write(folder, attempt_1_host_0="one\n")
    thread = Thread(target=logs.show, args=(folder, "", True, 0))
    thread.start()
    seen, deadline = "", time.monotonic() + DEADLINE_S
    while "one" not in seen and time.monotonic() < deadline:
        seen += capsys.readouterr().out
        time.sleep(0.02)
    write(folder, attempt_1_host_0="one\ntwo\n", attempt_2_host_0="three\n")
    held.close()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    lines = [line for line in (seen + capsys.readouterr().out).splitlines() if not line.startswith("==>")]
    assert lines == ["one", "two", "three"]


def test_a_run_that_stops_is_told_with_its_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "checkpoints/7").mkdir(parents=True)
    process = drive(folder)
    assert stop.stop_here(folder, DEADLINE_S) == 0
    assert capsys.readouterr().out == "run some: stopped, at step 7\n"
    assert process.wait(DEADLINE_S) == 0
    assert stop.stop_here(folder, DEADLINE_S) == 0
    assert capsys.readouterr().out == "run some: is not running (stopped)\n"


def test_a_process_that_ends_as_it_is_found_has_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = drive(folder)

    def ends(_: Path) -> int:
        process.terminate()
        process.wait(DEADLINE_S)
        return process.pid

    monkeypatch.setattr(rundir, "driver", ends)
    assert stop.stop_here(folder, DEADLINE_S) == 0
    process = drive(folder)
    monkeypatch.setattr(rundir, "driver", lambda folder: ends(folder) and None)  # its number is gone, too
    assert stop.stop_here(folder, DEADLINE_S) == 0


@pytest.mark.parametrize("wait_s", ["nan", "inf", "-1", "soon", ""])
def test_what_cannot_be_waited_is_refused(wait_s: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.stop", "run=some", f"wait_s={wait_s}"])
    with pytest.raises(ConfigError, match=f"^wait_s={wait_s}: must be a number of seconds, 0 or more$"):
        stop.work()


def test_a_run_that_does_not_stop_in_time_is_told_with_2_and_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = drive(folder, "deaf")
    try:
        assert stop.stop_here(folder, 0.3) == 2
        assert capsys.readouterr().out.startswith("run some: has not stopped within wait_s=0.3")
        assert process.poll() is None
    finally:
        process.communicate("")


def test_a_process_that_does_not_hold_the_lock_is_never_signalled(folder: Path) -> None:
    held = rundir.lock(folder)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        held.truncate(0)
        held.write(str(bystander.pid))  # as the number of another machine's process would be
        held.flush()
        with pytest.raises(ConfigError, match="^run=some: is driven on another machine, or by another user"):
            stop.stop_here(folder, 1.0)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        held.close()
