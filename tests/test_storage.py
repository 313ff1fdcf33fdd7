"""Storage that is full or failing while a run goes on: nothing stops, nothing that was written is lost.

A limit on the size of the files that a process may write stands for the full disk: the system refuses the write in
the same places. It is set on running processes from outside, for a while.
"""

import json
import os
import re
import resource
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.record import rundir
from tests.runs import event_names, finish, launch, losses, wait_for, wait_for_step

STEPS = 200  # long enough for a save to be tried again
OVERRIDES = (f"train.steps={STEPS}", "checkpoint.every=20", "eval.every=0", "optim.warmup_steps=5")
SMALL_FILES = 20_000  # bytes: lets the probe through, and no part of a checkpoint


@dataclass(frozen=True)
class Troubled:
    """A run that met full disks and finished."""

    folder: Path
    said: str
    kept: list[int]  # steps on disk while nothing could be saved


def limit(pids: list[int], size: int) -> None:
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def workers(folder: Path) -> list[int]:
    return [event["pids"] for event in rundir.events(folder) if event["event"] == "start"][-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    finish(launch("train", f"run.root={root}", "run.id=undisturbed", *OVERRIDES), 0)
    return root / "undisturbed"


@pytest.fixture(scope="module")
def troubled(root: Path) -> Troubled:
    """First one host can write no checkpoint, until a save has failed; then the controller can write nothing."""
    process = launch("train", f"run.root={root}", "run.id=troubled", *OVERRIDES)
    folder = root / "troubled"
    wait_for(lambda: "commit" in event_names(folder), "the first commit", process)
    limit(workers(folder)[1:], SMALL_FILES)
    wait_for(lambda: "save_failed" in event_names(folder), "a failed save", process)
    kept = rundir.committed(folder)
    limit(workers(folder), resource.RLIM_INFINITY)
    before = max(losses(folder))
    limit([process.pid], 100)
    wait_for(lambda: rundir.committed(folder)[-1] > before, "a checkpoint of steps that are not written down", process)
    limit([process.pid], resource.RLIM_INFINITY)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return Troubled(folder, err, kept)


def test_a_run_whose_save_failed_trains_on_and_saves_later(undisturbed: Path, troubled: Troubled) -> None:
    events = rundir.events(troubled.folder)
    failed = next(index for index, event in enumerate(events) if event["event"] == "save_failed")
    assert [event["step"] for event in events[failed:] if event["event"] == "commit"][-1] == STEPS
    assert losses(troubled.folder) == losses(undisturbed)
    assert not {"failure", "decision"} & set(event_names(troubled.folder))


def test_what_was_committed_before_a_save_failed_is_still_there(troubled: Troubled) -> None:
    events = rundir.events(troubled.folder)
    failed = next(index for index, event in enumerate(events) if event["event"] == "save_failed")
    assert set(troubled.kept) & {event["step"] for event in events[:failed] if event["event"] == "commit"}


def test_the_user_is_warned_of_what_cannot_be_written_and_told_that_it_is_over(troubled: Troubled) -> None:
    name = socket.gethostname()
    for warning in (f"WARNING: saving failed, at step .*: host 1 .{name}.: File too large", "WARNING: .* be written"):
        assert len(re.findall(warning, troubled.said)) == 1, troubled.said
    assert "tries before had failed" in troubled.said
    assert f"{troubled.folder} is written again" in troubled.said


def test_a_failed_save_leaves_nothing_beside_the_checkpoints(troubled: Troubled) -> None:
    assert [name for name in os.listdir(troubled.folder / "checkpoints") if not name.isdigit()] == []
    assert len(rundir.committed(troubled.folder)) == 2  # checkpoint.keep_last


def test_every_line_reaches_the_disk_that_was_full_when_it_was_written(troubled: Troubled) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (troubled.folder / name).read_text().splitlines():
            json.loads(line)
    assert list(losses(troubled.folder)) == list(range(1, STEPS + 1))


def test_a_run_that_cannot_save_at_its_end_gives_up_and_goes_on_from_what_it_had(undisturbed: Path, root: Path) -> None:
    process = launch("train", f"run.root={root}", "run.id=hopeless", *OVERRIDES, "timeout.save_s=15")
    folder = root / "hopeless"
    wait_for_step(process, folder, 1)
    wait_for(lambda: "commit" in event_names(folder), "the first commit", process)
    limit(workers(folder)[:1], SMALL_FILES)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    newest = rundir.committed(folder)[-1]
    assert f"timeout.save_s=15 (host 0 ({socket.gethostname()}): File too large); step {newest} is the newest" in err
    finish(launch("resume", "run=hopeless", f"run.root={root}"), 0)
    assert losses(folder) == losses(undisturbed)
