"""Stopped, killed, resumed: a run ends bitwise as if nothing had happened. Real Ray nodes, processes and signals."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from gemma.memory import slots
from orchestrator.hosts.worker import is_running
from orchestrator.record import rundir
from tests import wandb_spool
from tests.runs import (
    SMALL,
    assert_same_run,
    event_names,
    finish,
    goodput,
    kill_worker,
    launch,
    losses,
    orphaned_folders,
    wait_for,
    wait_for_step,
)

STEPS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(small_run: Path) -> Path:
    return small_run


def test_sigterm_saves_leaves_with_3_and_resume_ends_bitwise_the_same(undisturbed: Path, root: Path) -> None:
    process = launch("train", f"run.root={root}", "run.id=terminated", *SMALL)
    folder = root / "terminated"
    wait_for_step(process, folder, 13)
    process.send_signal(signal.SIGTERM)
    finish(process, 3)
    stopped_at = max(losses(folder))
    assert 13 <= stopped_at < STEPS
    assert rundir.committed(folder)[-1] == stopped_at
    finish(launch("resume", "run=latest", f"run.root={root}"), 0)
    assert_same_run(undisturbed, folder, STEPS)
    assert wandb_steps(folder) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(  # one handler serves both signals: each moment, and both signals at one
    ("moment", "number"),
    [("manifest", signal.SIGTERM), ("reserve", signal.SIGINT), ("start", signal.SIGTERM), ("start", signal.SIGINT)],
)
def test_a_signal_before_the_first_step_leaves_with_3_and_a_run_that_resumes(
    root: Path, moment: str, number: signal.Signals
) -> None:
    folder, before = root / f"early-{moment}-{number.name}", orphaned_folders()
    process = launch("train", f"run.root={root}", f"run.id={folder.name}", *SMALL)
    there = {"manifest": lambda: (folder / "manifest.json").exists()}
    wait_for(there.get(moment, lambda: moment in event_names(folder)), moment, process)
    process.send_signal(number)
    out = finish(process, 3)
    assert f"python -m launch.resume run={folder.name}" in out
    assert rundir.runs(str(root))[-1] == folder
    time.sleep(1.0)  # a process that escaped makes its directories again
    assert orphaned_folders() <= before


@pytest.mark.parametrize("rank", [0, 1])
def test_sigkill_of_a_worker_restarts_by_itself_and_ends_bitwise_the_same(
    undisturbed: Path, root: Path, rank: int
) -> None:
    process = launch("train", f"run.root={root}", f"run.id=killed-{rank}", *SMALL)
    folder = root / f"killed-{rank}"
    wait_for_step(process, folder, 15)
    kill_worker(folder, rank)
    finish(process, 0)
    failures = [e for e in rundir.events(folder) if e["event"] == "failure"]
    assert [(f["outcome"], f["rank"]) for f in failures] == [("host died", rank)]
    assert_same_run(undisturbed, folder, STEPS)
    assert wandb_steps(folder) == list(range(1, STEPS + 1))
    assert goodput(folder)["restarts"] == 1
    assert goodput(folder)["incidents"][0]["steps_lost"] <= 1


def test_a_flipped_bit_in_a_hosts_memory_is_seen_and_the_copy_elsewhere_is_used(undisturbed: Path, root: Path) -> None:
    process = launch("train", f"run.root={root}", "run.id=flipped", *SMALL)
    folder = root / "flipped"
    wait_for_step(process, folder, 15)
    files = memory_files([e["pids"] for e in rundir.events(folder) if e["event"] == "start"][-1][0])
    assert len(files) == 2  # of its own share and of its buddy's
    kill_worker(folder, 0)
    for path in files:
        flip_every_share(path)
    finish(process, 0)
    failures = [e for e in rundir.events(folder) if e["event"] == "failure"]
    assert [(f["outcome"], f["rank"]) for f in failures] == [("host died", 0), ("snapshot unusable", 0)]
    assert "this host's memory is damaged" in failures[1]["evidence"]
    restored = [e["source"] for e in rundir.events(folder) if e["event"] == "restore"]
    assert restored == ["memory"]
    assert_same_run(undisturbed, folder, STEPS)


def memory_files(pid: int) -> list[Path]:
    """The memory that the keeper beside a host's process holds: both are children of its Ray node."""
    beside = [child for child in psutil.Process(psutil.Process(pid).ppid()).children() if child.pid != pid]
    files = [file for child in beside for file in Path(f"/proc/{child.pid}/fd").iterdir()]
    found = [file for file in files if os.readlink(file).startswith("/memfd:gemma-")]
    return list({file.stat().st_ino: file for file in found}.values())


def flip_every_share(path: Path) -> None:
    """A bit of the share in each slot."""
    with open(path, "r+b") as file:
        slot_bytes = (os.fstat(file.fileno()).st_size - slots.PAGE) // slots.SLOTS
        for slot in range(slots.SLOTS):
            at = slots.PAGE + slot * slot_bytes + slots.PAGE + slots.NOTES_BYTES + 1000
            file.seek(at)
            changed = file.read(1)[0] ^ 4
            file.seek(at)
            file.write(bytes([changed]))


def test_sigkill_of_the_controller_leaves_no_process_and_resume_ends_bitwise_the_same(
    undisturbed: Path, root: Path
) -> None:
    process = launch("train", f"run.root={root}", "run.id=orphaned", *SMALL)
    folder = root / "orphaned"
    wait_for_step(process, folder, 15)
    pids = [e["pids"] for e in rundir.events(folder) if e["event"] == "start"][-1]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"hosts {pids} outlive their controller"
        time.sleep(0.05)
    finish(launch("resume", "run=orphaned", f"run.root={root}"), 0)
    assert_same_run(undisturbed, folder, STEPS)
    assert wandb_steps(folder) == list(range(1, STEPS + 1))


def test_resume_extends_a_finished_run(undisturbed: Path, root: Path) -> None:
    finish(launch("train", f"run.root={root}", "run.id=short", *SMALL), 0)
    out = finish(launch("resume", "run=short", f"run.root={root}", "train.steps=50"), 0)
    assert "train.steps: 40 -> 50 (safe)" in out
    assert "learning rate of step 41: 0.0003 as before; of step 50, the last: 0.0003" in out
    assert sorted(losses(root / "short")) == list(range(1, 51))


def test_resume_refuses_a_checkpoint_that_is_gone(root: Path) -> None:
    process = launch("train", f"run.root={root}", "run.id=robbed", *SMALL)
    folder = root / "robbed"
    wait_for_step(process, folder, 12)
    process.send_signal(signal.SIGINT)
    finish(process, 3)
    for step in rundir.committed(folder):
        os.rename(folder / "checkpoints" / str(step), folder / "checkpoints" / f"away-{step}")
    before, events = losses(folder), rundir.events(folder)
    for _ in range(3):
        finish(launch("resume", "run=robbed", f"run.root={root}"), 1)
    assert losses(folder) == before
    assert rundir.events(folder) == events


def test_another_mesh_takes_up_the_run_where_it_was(undisturbed: Path, root: Path) -> None:
    process = launch("train", f"run.root={root}", "run.id=resharded", *SMALL)
    folder = root / "resharded"
    wait_for_step(process, folder, 11)
    process.send_signal(signal.SIGTERM)
    finish(process, 3)
    step = rundir.committed(folder)[-1]
    out = finish(launch("resume", "run=resharded", f"run.root={root}", "mesh.fsdp=4", "mesh.tensor=2"), 0)
    assert "mesh.tensor: 1 -> 2 (resharding)" in out
    # The sums over devices are taken in another order; nothing else differs.
    assert losses(folder)[step + 1] == pytest.approx(losses(undisturbed)[step + 1], abs=1e-5)


def wandb_steps(folder: Path) -> list[int]:
    """The axis of wandb's own record of the training loss, as it stands there."""
    return [int(row["step"]) for row in wandb_spool.history(folder) if "loss" in row]
