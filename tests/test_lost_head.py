"""A local run whose head, or whose reaper, is killed."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import RUN, SMALL, finish, launch, orphaned_folders, wait_for_step


def child(pid: int, *parts: str) -> int:
    found = [c for c in psutil.Process(pid).children() if all(part in " ".join(c.cmdline()) for part in parts)]
    return found[0].pid


@pytest.mark.parametrize("part", [("gcs_server",), ("raylet/raylet", "--head=true")], ids=["gcs", "raylet"])
def test_a_lost_head_ends_the_run_at_once_with_2_and_nothing_left(tmp_path: Path, part: tuple[str, ...]) -> None:
    before = orphaned_folders()
    process = launch("train", f"run.root={tmp_path}", "run.id=lost", *SMALL, "train.steps=100000")
    wait_for_step(process, tmp_path / "lost", 1)
    spawned = psutil.Process(process.pid).children(recursive=True)
    os.kill(child(process.pid, *part), signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, (out, err)
    assert time.monotonic() - began < 20.0  # Ray's own patience is 60 s and more, the budget's 900
    assert "gave up: the head of the local Ray cluster is lost" in out + err
    assert "python -m launch.resume run=lost" in out + err
    _, alive = psutil.wait_procs(spawned, timeout=10)
    assert not alive
    assert orphaned_folders() <= before


def test_a_run_whose_reaper_is_killed_finishes_and_leaves_nothing(tmp_path: Path) -> None:
    before = orphaned_folders()
    process = launch("train", f"run.root={tmp_path}", "run.id=bare", *RUN)
    wait_for_step(process, tmp_path / "bare", 1)
    spawned = psutil.Process(process.pid).children(recursive=True)
    os.kill(child(process.pid, "reaper.py"), signal.SIGKILL)
    finish(process, 0)
    _, alive = psutil.wait_procs(spawned, timeout=10)
    assert not alive
    assert orphaned_folders() <= before
