"""Saves on storage that may be full or failing: asked first, agreed on by all hosts, and no error stops training.

A save that cannot be is refused before any host enters Orbax. One that fails later, in the background, is told by
`poll`; what it left behind is removed, what was committed before stays.
"""

import contextlib
import math
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gemma import checkpoint
from gemma.config import Checkpoint
from gemma.reports import Failed
from gemma.step import TrainState
from gemma.votes import SaveFailedError, Votes, agree, here, of_this_process, told

BUSY_S = 10.0  # training waits so long for the save before; then this one is put off
PROBE_S = 10.0  # for storage to take PROBE_BYTES
PROBE_BYTES = 4096
POLL_S = 0.02
UNFINISHED = "*.orbax-checkpoint-tmp*"


@dataclass
class Saver:
    """One host's part in saving."""

    folder: Path
    config: Checkpoint
    bytes: int  # of a checkpoint, all hosts together: they share the storage
    votes: Votes = field(default_factory=of_this_process)
    manager: ocp.CheckpointManager = field(init=False)
    step: int | None = None  # being written
    failed: Failed | None = None  # not yet told
    stale: bool = False  # the manager does not know what is on disk
    probing: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.manager = checkpoint.open_manager(self.folder, self.config, self.votes)


def open_saver(folder: Path, config: Checkpoint, state: Any) -> Saver:
    """state: its shapes."""
    return Saver(folder, config, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))


def save(saver: Saver, step: int, state: TrainState, summing: Any = None) -> str | None:
    """Returns once the state is copied off the devices, the commit follows in the background; or what is in the way,
    the same on all hosts, and then nothing is written.
    """
    settle(saver, BUSY_S)
    problem = trouble(saver)
    there = problem is None and step in saver.manager.all_steps()
    problem, there = agree(saver.votes, f"{here(saver.votes.rank)}: {problem}" if problem else None, there)
    if problem or there:
        return problem
    try:
        checkpoint.save(saver.manager, step, state, summing)
    except OSError as error:
        if saver.votes.client:
            raise  # the other hosts are inside
        saver.manager = checkpoint.open_manager(saver.folder, saver.config, saver.votes)
        return f"{here(saver.votes.rank)}: {told(error)}"
    saver.step = step
    return None


def poll(saver: Saver) -> Failed | None:
    """The save that failed since the last call, if any. Costs nothing and never raises."""
    if saver.step is not None and not saver.manager.is_saving_in_progress():
        step, saver.step = saver.step, None
        try:
            saver.manager.wait_until_finished()
        except Exception as error:
            host = "" if isinstance(error, SaveFailedError) else f"{here(saver.votes.rank)}: "
            saver.failed, saver.stale = Failed(step, host + told(error)), True
            clear(saver)
    failed, saver.failed = saver.failed, None
    return failed


def settle(saver: Saver, wait_s: float) -> bool:
    """Waits for the save that is under way; whether none is any more. How it came out is for `poll` to tell."""
    deadline = time.monotonic() + wait_s
    while saver.step is not None and saver.manager.is_saving_in_progress():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    saver.failed = poll(saver)
    return True


def drop_after(saver: Saver, step: int) -> None:
    """Deletes what was saved beyond a step that the run goes back to."""
    settle(saver, math.inf)
    if saver.stale:
        saver.manager.reload()
        saver.stale = False
    checkpoint.drop_after(saver.manager, step)


def clear(saver: Saver) -> None:
    """What a failed save has left holds space that the next one needs."""
    if saver.votes.rank == 0:
        for left in saver.folder.glob(UNFINISHED):
            shutil.rmtree(left, ignore_errors=True)


def trouble(saver: Saver) -> str | None:
    """What stands in the way of a save on this host."""
    if saver.step is not None:
        return f"step {saver.step} is still being written"
    if saver.probing and saver.probing.is_alive():
        return f"{saver.folder} has not answered since the last save was tried"
    found: list[str | None] = []
    path = saver.folder / f".probe-{saver.votes.rank}"
    saver.probing = threading.Thread(target=lambda: found.append(refusal(path, saver.bytes)), daemon=True)
    saver.probing.start()
    saver.probing.join(PROBE_S)
    problem = found[0] if found else f"{saver.folder} has not answered for {PROBE_S:.0f} s"
    if problem is None and saver.stale:
        try:
            saver.manager.reload()  # after a failure Orbax has forgotten the steps that it would have removed
            saver.stale = False
        except OSError as error:
            problem = told(error)
    return problem


def refusal(path: Path, needed_bytes: int) -> str | None:
    """Why storage does not take a checkpoint: asked for its free space, and given a small file to keep at `path`."""
    try:
        room = os.statvfs(path.parent)
        free = room.f_bavail * room.f_frsize
        if free < needed_bytes:
            return f"{path.parent} has {free / 1e9:.3g} GB free, a checkpoint takes {needed_bytes / 1e9:.3g} GB"
        try:
            with open(path, "wb", buffering=0) as file:
                left = bytes(PROBE_BYTES)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    except OSError as error:
        return told(error)
    return None
