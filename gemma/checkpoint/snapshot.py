"""Snapshots of the train state to host memory, every few steps, while training goes on.

A jitted program copies a device's part of every array into one flat array of words. So the state itself can be given
to the next step at once, and one transfer a device brings the copy to the host, where a thread puts it into memory
that outlives this process and sends it to another host's.

The same program sums the words of each part, and the program that unpacks them does so again after a recovery: what
has happened to them between the two, on the way to the host, in its memory for hours, over the network or on the way
back, is seen, as with checkpoints. A sum on the host would leave out the way from the device and back and cost the
processor more; the sums of `checksums.summing` have devices talk to each other, which a program beside a step must not.
"""

import hashlib
import json
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma.checkpoint import checksums, words
from gemma.memory import slots, wire
from gemma.memory.slots import Slots
from gemma.memory.wire import Address, Source
from gemma.messages import Evaluated, Row
from gemma.plan.analytic import SNAPSHOT_COPY_SHARE
from gemma.train.step import TrainState

AXES = ("replica", "fsdp", "tensor")
SETTLE_S = 120.0  # for one snapshot to be written and sent
FORMAT = 2  # of parts and notes: another version's snapshots are another share's


@dataclass(frozen=True)
class Share:
    """What this host holds of the state. Hosts whose shares have equal keys hold the same bytes."""

    key: str
    words: int  # uint32, of one part
    parts: tuple[tuple[int, int], ...]  # places along (fsdp, tensor), in the order in which the parts lie in memory

    @property
    def bytes(self) -> int:
        return 4 * self.words * len(self.parts)


class Packed(NamedTuple):
    """A copy of the state, on the devices."""

    words: jax.Array  # uint32, a part a device
    sums: jax.Array  # uint32 [devices, 2], of each part


class SnapshotError(RuntimeError):
    """A snapshot cannot be used: its host has died meanwhile, or it is not what was written."""


def share_of(state: TrainState, mesh: jax.sharding.Mesh) -> Share:
    """state: of jax.ShapeDtypeStruct with shardings."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    size = sum(words.count(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for _, leaf in flat)
    here = jax.process_index()
    places = np.argwhere(np.vectorize(lambda device: device.process_index == here)(mesh.devices))
    parts = tuple(sorted({(int(fsdp), int(tensor)) for _, fsdp, tensor in places}))
    leaves = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in flat]
    seen = repr([FORMAT, leaves, mesh.devices.shape[1:], parts])
    return Share(hashlib.sha256(seen.encode()).hexdigest()[:24], size, parts)


def fits_beside(copy_bytes: float, device_bytes: float) -> bool:
    """Whether a copy of the state may lie on a device while a step runs. Else training waits until it is off again."""
    return copy_bytes <= SNAPSHOT_COPY_SHARE * device_bytes


def device_bytes() -> float:
    """Memory of a device; infinite where it is the host's."""
    return float((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf))


def flat_shape(state: TrainState, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    size = mesh.devices.size * share_of(state, mesh).words
    return jax.ShapeDtypeStruct((size,), jnp.uint32, sharding=NamedSharding(mesh, PartitionSpec(AXES)))


def packing(state: TrainState, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The programs: state to Packed, and its words to the state and their sums. No device talks to another.

    Raises ValueError for leaves that cannot be packed.
    """
    leaves, tree = jax.tree.flatten(state)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    flat = PartitionSpec(AXES)

    def pack(state: TrainState) -> Packed:
        part = jnp.concatenate([words.packed(leaf) for leaf in jax.tree.leaves(state)])
        return Packed(part, sums_of(part))

    def unpack(part: jax.Array) -> tuple[TrainState, jax.Array]:
        found, at = [], 0
        for leaf in leaves:
            shape = leaf.sharding.shard_shape(leaf.shape)
            size = words.count(shape, leaf.dtype)
            found.append(words.unpacked(part[at : at + size], shape, leaf.dtype))
            at += size
        return jax.tree.unflatten(tree, found), sums_of(part)

    cut = NamedSharding(mesh, flat)
    return (
        jax.jit(
            jax.shard_map(pack, mesh=mesh, in_specs=(specs,), out_specs=flat, check_vma=False),
            out_shardings=cut,
        ),
        jax.jit(
            jax.shard_map(unpack, mesh=mesh, in_specs=flat, out_specs=(specs, flat), check_vma=False),
            out_shardings=(places, cut),
        ),
    )


def sums_of(part: jax.Array) -> jax.Array:
    """uint32 [1, 2]: both sums of a device's words."""
    return checksums.part_sums(part, part.shape, ((),))[None]


def parts_here(flat: jax.Array, mesh: jax.sharding.Mesh, share: Share) -> list[jax.Array]:
    """This host's parts of words or sums on their devices, in the order of the share; of replicas the first."""
    by_device = {shard.device: shard.data for shard in flat.addressable_shards}
    return [
        next(by_device[device] for device in mesh.devices[:, fsdp, tensor] if device in by_device)
        for fsdp, tensor in share.parts
    ]


def placed(parts: np.ndarray, abstract: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh, share: Share) -> jax.Array:
    """The flat array on the devices again. parts: uint32 [parts, words]."""
    arrays = []
    for device in abstract.sharding.addressable_devices:
        _, fsdp, tensor = np.argwhere(mesh.devices == device)[0]
        arrays.append(jax.device_put(parts[share.parts.index((int(fsdp), int(tensor)))], device))
    return jax.make_array_from_single_device_arrays(abstract.shape, abstract.sharding, arrays)


def restore(
    source: Source, step: int, share: Share, mesh: jax.sharding.Mesh, unpack: Any, flat: jax.ShapeDtypeStruct
) -> tuple[TrainState, Any]:
    """The state and what was noted with it. unpack, flat: of `packing` and `flat_shape`, for the same layout.

    Raises SnapshotError. What is found to be damaged is given up where it lies, so that nobody takes it again.
    """
    try:
        parts, noted = read(source, share, step)
        problem = None
    except (ValueError, RecursionError) as error:
        problem = str(error)
    except (OSError, KeyError) as error:
        raise SnapshotError(f"the snapshot of step {step} is gone: {error!r}") from error
    if problem is None:
        state, sums = unpack(placed(parts, flat, mesh, share))
        problem = damage(state, sums, noted, step, mesh, share)
    if problem is not None:
        where = "this host's memory" if source.address is None else f"the memory of {source.address.ip}"
        message = f"the snapshot of step {step} in {where} is damaged: {problem}"
        raise SnapshotError(f"{message}; {give_up(source, share, step)}")
    return state, noted


def damage(
    state: TrainState, sums: jax.Array, noted: Any, step: int, mesh: jax.sharding.Mesh, share: Share
) -> str | None:
    """In what a state differs from the one that was packed."""
    saved = noted.get("sums") if isinstance(noted, dict) else None
    for shard in sums.addressable_shards:
        _, fsdp, tensor = np.argwhere(mesh.devices == shard.device)[0]
        part = share.parts.index((int(fsdp), int(tensor)))
        if not isinstance(saved, list) or len(saved) != len(share.parts) or saved[part] != as_list(shard.data):
            return f"its part {part} is not what was written, by its checksum"
    return None if int(state.step) == step else f"it holds step {int(state.step)}"


def as_list(sums: jax.Array) -> list[int]:
    return [int(one) for one in np.asarray(sums).ravel()]


def read(source: Source, share: Share, step: int) -> tuple[np.ndarray, Any]:
    """uint32 [parts, words] and the notes. Raises OSError, KeyError where it is gone, ValueError for damaged notes."""
    if source.path is not None:
        there = slots.open_slots(Path(source.path), share.bytes)
        noted = slots.notes(there, step)
        part = np.frombuffer(slots.share(there, slots.held(there)[step]), np.uint32).copy()  # it will be written again
    else:
        assert source.address is not None
        got, noted = wire.get(source.address, share.key, step, share.bytes)
        part = np.frombuffer(got, np.uint32)
    return part.reshape(len(share.parts), share.words), noted


def give_up(source: Source, share: Share, step: int) -> str:
    """No recovery takes this copy again. Returns what became of it."""
    try:
        if source.path is not None:
            slots.drop(slots.open_slots(Path(source.path), share.bytes), step)
        else:
            assert source.address is not None
            wire.drop(source.address, share.key, step)
    except OSError as error:
        return f"it could not be given up: {error!r}"
    return "it is given up"


def noted(attempt: int, rows: Sequence[Row], evals: Sequence[Evaluated]) -> dict[str, Any]:
    """What goes with a snapshot: results that a controller which dies now would never hear of."""
    return {"attempt": attempt, "rows": [asdict(row) for row in rows], "evals": [asdict(one) for one in evals]}


class SnapshotWriter:
    """A thread that brings packed states to memory, one at a time."""

    def __init__(self, share: Share, mesh: jax.sharding.Mesh, path: str, buddy: Address | None):
        """path: this host's slots. buddy: whose memory holds a copy; None where a replica's host does anyway."""
        self.share, self.mesh, self.buddy = share, mesh, buddy
        self.slots: Slots = slots.open_slots(Path(path), share.bytes)
        self.connection: socket.socket | None = None
        self.failed: str | None = None  # why the last copy did not reach the buddy
        self.written = threading.Event()
        self.written.set()
        self.waited_s = 0.0  # by those who hand over
        self.queue: queue.Queue[tuple[int, Packed, Callable[[], dict[str, Any]]]] = queue.Queue(1)
        threading.Thread(target=self.work, daemon=True, name="snapshots").start()

    def settle(self) -> None:
        """Waits until the last snapshot is written. Raises TimeoutError."""
        if not self.written.wait(SETTLE_S):
            raise TimeoutError(f"a snapshot was not written within {SETTLE_S:.0f} s")

    def hand_over(self, step: int, packed: Packed, noted: Callable[[], dict[str, Any]]) -> None:
        """noted: makes what goes with it, to be written as JSON; called in the background.

        Once this returns, the snapshot before this one is whole. The hosts have a step in flight each besides, so they
        are two snapshots apart at most.
        """
        started = time.monotonic()
        self.settle()
        self.waited_s += time.monotonic() - started
        self.written.clear()
        self.queue.put((step, packed, noted))

    def work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), slots.BACKGROUND_NICENESS)
        while True:
            step, packed, noted = self.queue.get()
            try:
                self.write(step, packed, noted())
            except Exception as error:  # the snapshot is lost, training is not
                self.failed = repr(error)
                print(f"snapshot of step {step}: {error!r}", flush=True)
            finally:
                del packed
                self.written.set()

    def write(self, step: int, packed: Packed, noted: dict[str, Any]) -> None:
        slot, view = slots.begin(self.slots, step)
        to = np.frombuffer(view, np.uint32).reshape(len(self.share.parts), self.share.words)
        parts, sums = (parts_here(array, self.mesh, self.share) for array in packed)
        for part in (*parts, *sums):
            part.copy_to_host_async()
        for row, part in zip(to, parts, strict=True):
            row[:] = np.asarray(part)
        notes = json.dumps(noted | {"sums": [as_list(one) for one in sums]}).encode()
        slots.commit(self.slots, slot, step, notes)
        if self.buddy is not None:
            self.send(step, view, notes)

    def send(self, step: int, view: memoryview, notes: bytes) -> None:
        """Connects again once: the other end may have closed a connection that was long idle."""
        assert self.buddy is not None
        for last in (False, True):
            try:
                if self.connection is None:
                    self.connection = wire.connect(self.buddy)
                wire.put(self.connection, self.buddy, self.share.key, step, view, notes)
                self.failed = None
                return
            except OSError as error:
                if self.connection is not None:
                    self.connection.close()
                self.connection, self.failed = None, repr(error)
                if last:
                    raise
