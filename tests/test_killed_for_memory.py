"""A host's process that the kernel kills because its control group has no memory left."""

import contextlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.record import rundir
from tests.runs import RUN, STEPS, assert_same_run, finish, launch, wait_for_step

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
LIMITS = {V1 / "memory.limit_in_bytes": "memory.limit_in_bytes", V2 / "cgroup.controllers": "memory.max"}
REMOVE_S = 20.0


@contextmanager
def starved() -> Iterator[Path]:
    """A control group without a page to give."""
    there = next((probe for probe in LIMITS if probe.exists()), None)
    if there is None:
        pytest.skip("no memory control groups here")
    group = there.parent / f"gemma-test-{secrets.token_hex(4)}"
    try:
        group.mkdir()
        (group / LIMITS[there]).write_text("4096")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        yield group
    finally:
        deadline = time.monotonic() + REMOVE_S
        while group.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # the dead are still in it
                group.rmdir()
            time.sleep(0.05)


def test_it_is_told_as_that_and_the_run_goes_on_from_memory(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "starved"
    with starved() as group:
        process = launch("train", f"run.root={tmp_path}", f"run.id={folder.name}", *RUN)
        wait_for_step(process, folder, 10)
        pids = next(event["pids"] for event in rundir.events(folder) if event["event"] == "start")
        (group / "cgroup.procs").write_text(str(pids[1]))
        finish(process, 0)
    (failure,) = [event for event in rundir.events(folder) if event["event"] == "failure"]
    assert (failure["outcome"], failure["rank"]) == ("out of memory", 1), failure
    assert "killed for memory" in failure["evidence"]
    (restore,) = [event for event in rundir.events(folder) if event["event"] == "restore"]
    assert restore["source"] == "memory"
    assert_same_run(undisturbed, folder, STEPS)
