"""Snapshots of the train state to host memory, every few steps, while training goes on.

A jitted program copies a device's part of every array into one flat array of words. So the state itself can be given
to the next step at once, and one transfer a device brings the copy to the host, where a thread puts it into memory
that outlives this process and sends it to another host's.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma.memory import slots, wire
from gemma.memory.slots import Slots
from gemma.memory.wire import Address, Source
from gemma.messages import Evaluated, Row
from gemma.plan.analytic import SNAPSHOT_COPY_SHARE
from gemma.train.step import TrainState

AXES = ("replica", "fsdp", "tensor")
SETTLE_S = 120.0  # for one snapshot to be written and sent


@dataclass(frozen=True)
class Share:
    """What this host holds of the state. Hosts whose shares have equal keys hold the same bytes."""

    key: str
    words: int  # uint32, of one part
    parts: tuple[tuple[int, int], ...]  # places along (fsdp, tensor), in the order in which the parts lie in memory

    @property
    def bytes(self) -> int:
        return 4 * self.words * len(self.parts)


class SnapshotError(RuntimeError):
    """A snapshot that was there a moment ago is gone: its host died meanwhile."""


def share_of(state: TrainState, mesh: jax.sharding.Mesh) -> Share:
    """state: of jax.ShapeDtypeStruct with shardings."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    words = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for _, leaf in flat)
    here = jax.process_index()
    places = np.argwhere(np.vectorize(lambda device: device.process_index == here)(mesh.devices))
    parts = tuple(sorted({(int(fsdp), int(tensor)) for _, fsdp, tensor in places}))
    leaves = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in flat]
    seen = repr([leaves, mesh.devices.shape[1:], parts])
    return Share(hashlib.sha256(seen.encode()).hexdigest()[:24], words, parts)


def fits_beside(copy_bytes: float, device_bytes: float) -> bool:
    """Whether a copy of the state may lie on a device while a step runs. Else training waits until it is off again."""
    return copy_bytes <= SNAPSHOT_COPY_SHARE * device_bytes


def device_bytes() -> float:
    """Memory of a device; infinite where it is the host's."""
    return float((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf))


def flat_shape(state: TrainState, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    words = share_of(state, mesh).words
    place = NamedSharding(mesh, PartitionSpec(AXES))
    return jax.ShapeDtypeStruct((mesh.devices.size * words,), jnp.uint32, sharding=place)


def packing(state: TrainState, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The programs: state to one flat uint32 array, a part a device, and back. No device talks to another.

    Raises ValueError for leaves that are not four bytes wide.
    """
    leaves, tree = jax.tree.flatten(state)
    if any(leaf.dtype.itemsize != 4 for leaf in leaves):
        raise ValueError("a snapshot is of words: every leaf of the state must be four bytes wide")
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    flat = PartitionSpec(AXES)

    def pack(state: TrainState) -> jax.Array:
        words = [jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel() for leaf in jax.tree.leaves(state)]
        return jnp.concatenate(words)

    def unpack(words: jax.Array) -> TrainState:
        found, at = [], 0
        for leaf in leaves:
            shape = leaf.sharding.shard_shape(leaf.shape)
            part = words[at : at + math.prod(shape)].reshape(shape)
            found.append(jax.lax.bitcast_convert_type(part, leaf.dtype))
            at += math.prod(shape)
        unpacked: TrainState = jax.tree.unflatten(tree, found)
        return unpacked

    return (
        jax.jit(jax.shard_map(pack, mesh=mesh, in_specs=(specs,), out_specs=flat, check_vma=False)),
        jax.jit(
            jax.shard_map(unpack, mesh=mesh, in_specs=flat, out_specs=specs, check_vma=False), out_shardings=places
        ),
    )


def parts_here(packed: jax.Array, mesh: jax.sharding.Mesh, share: Share) -> list[jax.Array]:
    """This host's parts on their devices, in the order of the share; of replicas the first."""
    by_device = {shard.device: shard.data for shard in packed.addressable_shards}
    return [
        next(by_device[device] for device in mesh.devices[:, fsdp, tensor] if device in by_device)
        for fsdp, tensor in share.parts
    ]


def placed(words: np.ndarray, abstract: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh, share: Share) -> jax.Array:
    """The flat array on the devices again. words: uint32 [parts, words]."""
    arrays = []
    for device in abstract.sharding.addressable_devices:
        _, fsdp, tensor = np.argwhere(mesh.devices == device)[0]
        arrays.append(jax.device_put(words[share.parts.index((int(fsdp), int(tensor)))], device))
    return jax.make_array_from_single_device_arrays(abstract.shape, abstract.sharding, arrays)


def read(source: Source, share: Share, step: int) -> tuple[np.ndarray, Any]:
    """uint32 [parts, words] and the notes. Raises SnapshotError."""
    try:
        if source.path is not None:
            there = slots.open_slots(Path(source.path), share.bytes)
            view, noted = slots.share(there, slots.held(there)[step]), slots.notes(there, step)
            words = np.frombuffer(view, np.uint32).copy()  # the slot will be written again
        else:
            assert source.address is not None
            got, noted = wire.get(source.address, share.key, step)
            words = np.frombuffer(got, np.uint32)
    except (OSError, KeyError) as error:
        raise SnapshotError(f"the snapshot of step {step} is gone: {error!r}") from error
    return words.reshape(len(share.parts), share.words), noted


def noted(attempt: int, rows: Sequence[Row], evals: Sequence[Evaluated]) -> bytes:
    """What goes with a snapshot: results that a controller which dies now would never hear of."""
    found = {"attempt": attempt, "rows": [asdict(row) for row in rows], "evals": [asdict(one) for one in evals]}
    return json.dumps(found).encode()


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
        self.waited_s = 0.0  # by who hands over
        self.queue: queue.Queue[tuple[int, jax.Array, Callable[[], bytes]]] = queue.Queue(1)
        threading.Thread(target=self.work, daemon=True, name="snapshots").start()

    def settle(self) -> None:
        """Waits until the last snapshot is written. Raises TimeoutError."""
        if not self.written.wait(SETTLE_S):
            raise TimeoutError(f"a snapshot was not written within {SETTLE_S:.0f} s")

    def hand_over(self, step: int, packed: jax.Array, noted: Callable[[], bytes]) -> None:
        """noted: makes what goes with it, JSON; called where it holds nobody up.

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

    def write(self, step: int, packed: jax.Array, noted: bytes) -> None:
        slot, view = slots.begin(self.slots, step)
        to = np.frombuffer(view, np.uint32).reshape(len(self.share.parts), self.share.words)
        parts = parts_here(packed, self.mesh, self.share)
        for part in parts:
            part.copy_to_host_async()
        for row, part in zip(to, parts, strict=True):
            row[:] = np.asarray(part)
        slots.commit(self.slots, slot, step, noted)
        if self.buddy is not None:
            self.send(step, view, noted)

    def send(self, step: int, view: memoryview, noted: bytes) -> None:
        """One reconnection: the other end may have been replaced since."""
        assert self.buddy is not None
        for last in (False, True):
            try:
                if self.connection is None:
                    self.connection = wire.connect(self.buddy)
                wire.put(self.connection, self.buddy, self.share.key, step, view, noted)
                self.failed = None
                return
            except OSError as error:
                if self.connection is not None:
                    self.connection.close()
                self.connection, self.failed = None, repr(error)
                if last:
                    raise
