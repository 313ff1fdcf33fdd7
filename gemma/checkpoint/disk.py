"""Checkpoints on disk by Orbax: asynchronous, atomic, committed or not there at all; and given back as saved or not.

The checksums of the arrays (`checksums`) are committed with them. They are computed again on the devices
that a state is restored to, so whatever happened to the bytes on their way there and back is seen.
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import type_handlers

from gemma.checkpoint import checksums
from gemma.config import Checkpoint
from gemma.train.step import TrainState

COMMIT_S = 1800  # for a save to be whole on disk, once it is copied off the devices
METADATA = "_CHECKPOINT_METADATA"  # Orbax's own name for what it writes of every checkpoint


class CheckpointError(RuntimeError):
    """A checkpoint that should be there cannot be read."""


def open_manager(folder: Path, config: Checkpoint, barrier: Any = None) -> ocp.CheckpointManager:
    """When to save is the controller's decision; what stays is `config`'s. Step N means N steps done.

    barrier: where hosts meet while they write (votes.py); None is Orbax's own.
    """
    keep: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_last)]
    if config.keep_every:
        keep.append(policies.EveryNSteps(config.keep_every))
    # Named, the hosts meet through JAX's coordinator, and a save may run beside training; else by a program on the
    # devices, which there waits for the step that waits for it.
    several = set(range(jax.process_count())) if jax.process_count() > 1 else None
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=several),
        save_decision_policy=policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=COMMIT_S, barrier_sync_fn=barrier),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # reads no checkpoint yet: a torn one fails at its own restore
    )
    return ocp.CheckpointManager(folder, options=options, item_handlers=handler())


def handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's usual array handler, without its sharding file, which takes a fifth of a save's CPU time:
    the restoring code gives the shardings.
    """
    arrays = type_handlers.ArrayHandler(enable_write_sharding_file=False)
    registry = type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, summed: jax.Array | None = None) -> None:
    """Returns once the state is copied off the devices; the commit follows in the background.

    summed: by the program of `gemma.checkpoint.checksums`, to be committed together with the arrays.
    """
    if step not in manager.all_steps():
        noted = {"sums": checksums.as_hex(state, summed)} if summed is not None else None
        manager.save(step, args=ocp.args.PyTreeSave(state._asdict()), custom_metadata=noted, force=True)


def drop_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Deletes what was saved beyond a step that the run goes back to."""
    manager.wait_until_finished()
    for later in [saved for saved in manager.all_steps() if saved > step]:
        manager.delete(later)


def restore(manager: ocp.CheckpointManager, step: int, abstract: TrainState, summing: Any = None) -> TrainState:
    """The state of a committed step, laid out as `abstract` asks: another mesh means resharding on the way in.

    summing: the program of `gemma.checkpoint.checksums` for that layout. Raises CheckpointError naming the checkpoint,
    and what of it is not as it was saved; never falls back to a fresh start.
    """
    path = Path(str(manager.directory)) / str(step)
    try:
        saved = saved_sums(path)
        tree = abstract._asdict()
        wanted = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
        state = TrainState(**manager.restore(step, args=wanted))
        if int(state.step) != step:
            raise ValueError(f"it holds step {int(state.step)}")
        if saved is not None and summing is not None:
            found = checksums.as_hex(state, summing(state))
            changed = sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
            if changed:
                others = f" and {len(changed) - 1} more" if changed[1:] else ""
                raise ValueError(f"{changed[0]}{others}: not what was saved, by its checksum")
        return state
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def saved_sums(path: Path) -> dict[str, str] | None:
    """What was noted at the save; None of a checkpoint from before there were sums.

    Not read by Orbax, which treats an unreadable file as an empty one.
    """
    noted = json.loads((path / METADATA).read_text())["custom_metadata"] or {}
    found: dict[str, str] | None = noted.get("sums")
    return found
