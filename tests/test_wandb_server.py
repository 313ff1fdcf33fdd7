"""One run, one history, in what the real wandb client sends to a server that records it, whatever was resumed."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from orchestrator.config import Config, with_id
from orchestrator.record import rundir
from orchestrator.record.wandb_log import WandbLog, eval_row
from tests.test_config import config_of
from tests.wandb_server import Runs, serving

TOP = Path(__file__).parents[1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Runs]:
    with serving() as runs:
        monkeypatch.setenv("WANDB_BASE_URL", runs.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # 15 s otherwise
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
        yield runs


def config(mode: str) -> Config:
    return with_id(config_of(f"wandb.mode={mode}"), "some", "runs")


def controller(folder: Path, mode: str, steps: Iterable[int], eval_every: int = 5) -> None:
    """One controller's life: each step reaches metrics.jsonl, then wandb, and so do evals."""
    folder.mkdir(exist_ok=True)
    warned: list[str] = []
    log = WandbLog(config(mode), folder, warned.append)
    metrics, events = (rundir.Appender(folder / name) for name in ("metrics.jsonl", "events.jsonl"))
    for step in steps:
        metrics.write({"step": step, "loss": float(step)})
        log.log({"step": step, "loss": float(step)})
        if step % eval_every == 0:
            events.write({"event": "eval", "time": 1.0, "step": step, "loss": 2.0, "bits_per_byte": 3.0})
            log.log(eval_row(step, 2.0, 3.0, {}))
    log.finish()
    assert warned == []


def spooled(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def test_what_wandb_sync_sends_after_resumes_is_one_complete_history(server: Runs, tmp_path: Path) -> None:
    for steps in (range(1, 11), range(8, 21), range(21, 31)):
        controller(tmp_path / "some", "offline", steps)
    (folder,) = spooled(tmp_path / "some")
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.steps("some") == list(range(1, 31))
    assert server.steps("some", "eval/loss", "eval/step") == [5, 10, 15, 20, 25, 30]


def test_online_a_resume_sends_what_the_server_lacks_and_nothing_twice(server: Runs, tmp_path: Path) -> None:
    """The first controller is killed after the server has some of its rows; steps are done again by the second."""
    folder = tmp_path / "some"
    first = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=TOP, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not server.files.get("some", {}).get("wandb-history.jsonl"):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline, "the first rows reached the server within 120 s"
        time.sleep(0.05)
    first.kill()
    first.communicate(timeout=60)
    newest = max(rundir.metrics(folder))
    controller(folder, "online", range(newest - 2, newest + 11))
    assert server.steps("some") == list(range(1, newest + 11))
    evals = server.steps("some", "eval/loss", "eval/step")
    assert evals == list(range(0, newest + 11, 5))


KILLED = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from orchestrator.record import rundir
    from tests.test_wandb_server import controller

    def slowly():
        for step in range(1, 10**6):
            yield step
            time.sleep(0.02)

    folder = Path(sys.argv[1])
    folder.mkdir()
    first = {"event": "eval", "time": 1.0, "step": 0, "loss": 2.0, "bits_per_byte": 3.0}
    rundir.Appender(folder / "events.jsonl").write(first)
    controller(folder, "online", slowly())
""")


def test_online_after_offline_the_server_has_all_and_sync_sends_nothing_again(server: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    controller(folder, "offline", range(1, 11))
    controller(folder, "online", range(11, 21))
    assert server.steps("some") == list(range(1, 21))
    assert spooled(folder) == []
    assert len(list(folder.glob("wandb/replayed-offline-run-*/run-some.wandb"))) == 1  # and nothing is lost
    assert os.listdir(folder / "wandb")
