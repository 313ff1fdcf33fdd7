"""Checkpoints on disk by Orbax: asynchronous, atomic, committed or not there at all."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gemma.config import Checkpoint
from gemma.step import TrainState

COMMIT_S = 1800  # for a save to be whole on disk, once it is copied off the devices


class CheckpointError(RuntimeError):
    """A checkpoint that should be there cannot be read."""


def open_manager(folder: Path, config: Checkpoint, barrier: Any = None) -> ocp.CheckpointManager:
    """When to save is the controller's decision; what stays is `config`'s. Step N means N steps done.

    barrier: where hosts meet while they write (votes.py); None is Orbax's own.
    """
    keep: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last)]
    if config.keep_every:
        keep.append(policies.EveryNSteps(config.keep_every))
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=COMMIT_S, barrier_sync_fn=barrier),
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(folder, options=options)


def save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Returns once the state is copied off the devices; the commit follows in the background."""
    if step not in manager.all_steps():
        manager.save(step, args=ocp.args.StandardSave(state._asdict()), force=True)


def drop_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Deletes what was saved beyond a step that the run goes back to."""
    manager.wait_until_finished()
    for later in [saved for saved in manager.all_steps() if saved > step]:
        manager.delete(later)


def restore(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> TrainState:
    """The state of a committed step, laid out as `abstract` asks: another mesh means resharding on the way in.

    Raises CheckpointError naming the checkpoint; never falls back to a fresh start.
    """
    try:
        found = manager.restore(step, args=ocp.args.StandardRestore(abstract._asdict()))
        state = TrainState(**found)
        if int(state.step) != step:
            raise ValueError(f"it holds step {int(state.step)}")
        return state
    except Exception as error:
        path = Path(str(manager.directory)) / str(step)
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
