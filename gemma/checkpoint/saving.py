"""Saves beside training, on storage that may be full or failing: agreed on by all hosts, and no error stops training.

A thread has a copy of the state and does the rest: asks the storage, votes with the other hosts' threads, writes. A
save that cannot be is refused before any host enters Orbax. `poll` says what becomes of one; what a failed one
left behind is removed, what was committed before stays.
"""

import contextlib
import math
import os
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gemma.checkpoint import disk
from gemma.checkpoint.votes import SaveFailedError, Votes, agree, here, of_this_process, one_line
from gemma.config import Checkpoint
from gemma.messages import SaveFailed
from gemma.train.step import TrainState

BUSY_S = 10.0  # training waits so long for the save before; then this one fails
PROBE_S = 10.0  # for storage to take PROBE_BYTES
PROBE_BYTES = 4096
SAVING_NICENESS = 19  # the thread's niceness, and that of those it starts
UNFINISHED = "*.orbax-checkpoint-tmp*"


@dataclass(frozen=True)
class Job:
    step: int
    state: TrainState | None  # a copy; None where the save before took too long for one to be made
    off: threading.Event = field(default_factory=threading.Event)  # the devices are not needed for it any more
    summed: Any = None  # uint32 [leaves, 2] on the devices, of `gemma.checkpoint.checksums`; None is unsummed


@dataclass
class Saver:
    """One host's part in saving."""

    folder: Path
    config: Checkpoint
    bytes: int  # of a checkpoint, all hosts together: they share the storage
    votes: Votes = field(default_factory=of_this_process)
    manager: ocp.CheckpointManager = field(init=False)
    jobs: queue.Queue[Job] = field(default_factory=queue.Queue)
    failed: deque[SaveFailed] = field(default_factory=deque)  # not yet told
    stale: bool = False  # the manager does not know what is on disk
    probing: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.manager = disk.open_manager(self.folder, self.config, self.votes)
        threading.Thread(target=work, args=(self,), daemon=True, name="saves").start()


def open_saver(folder: Path, config: Checkpoint, state: Any) -> Saver:
    """state: its shapes."""
    return Saver(folder, config, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))


def copying(state: TrainState) -> Any:
    """The program: a state that stays when the step takes the other. state: of jax.ShapeDtypeStruct with shardings."""
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=places)


def begin(saver: Saver, step: int, copied: Callable[[], tuple[TrainState, Any]]) -> Job:
    """Has a step saved. Every host must come to this, in the same order.

    copied: a copy of the state that nothing else will use, and its sums; asked for once there is room for it.
    """
    state, summed = copied() if settle(saver, BUSY_S) else (None, None)
    saver.jobs.put(job := Job(step, state, summed=summed))
    return job


def settle(saver: Saver, wait_s: float) -> bool:
    """Waits for the saves that are under way; whether none is any more. How they came out is for `poll` to tell."""
    with saver.jobs.all_tasks_done:
        wait_s = min(wait_s, threading.TIMEOUT_MAX)
        return saver.jobs.all_tasks_done.wait_for(lambda: not saver.jobs.unfinished_tasks, wait_s)


def poll(saver: Saver) -> SaveFailed | None:
    """A save that failed and was not yet told of. Costs nothing and never raises."""
    return saver.failed.popleft() if saver.failed else None


def work(saver: Saver) -> None:
    """The thread: one save after another, at low CPU priority."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SAVING_NICENESS)
    while True:
        job = saver.jobs.get()
        step = job.step
        try:
            problem = write(saver, job)
        except Exception as error:
            host = "" if isinstance(error, SaveFailedError) else f"{here(saver.votes.rank)}: "
            problem, saver.stale = host + one_line(error), True
            clear(saver)
        job.off.set()
        if problem:
            saver.failed.append(SaveFailed(step, problem))
        del job
        saver.jobs.task_done()


def write(saver: Saver, job: Job) -> str | None:
    """Returns once the step is whole on disk, or what is in the way, the same on all hosts. Raises as Orbax does."""
    problem = trouble(saver) if job.state is not None else f"the save before is not done after {BUSY_S:.0f} s"
    there = problem is None and job.step in saver.manager.all_steps()
    problem, there = agree(saver.votes, f"{here(saver.votes.rank)}: {problem}" if problem else None, there)
    if problem or there:
        return problem
    assert job.state is not None
    disk.save(saver.manager, job.step, job.state, job.summed)
    job.off.set()
    saver.manager.wait_until_finished()
    return None


def drop_after(saver: Saver, step: int) -> None:
    """Deletes what was saved beyond a step that the run goes back to."""
    settle(saver, math.inf)
    if saver.stale:
        saver.manager.reload()
        saver.stale = False
    disk.drop_after(saver.manager, step)


def clear(saver: Saver) -> None:
    """What a failed save has left holds space that the next one needs."""
    if saver.votes.rank == 0:
        for left in saver.folder.glob(UNFINISHED):
            shutil.rmtree(left, ignore_errors=True)


def trouble(saver: Saver) -> str | None:
    """What stands in the way of a save on this host."""
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
            problem = one_line(error)
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
        return one_line(error)
    return None
