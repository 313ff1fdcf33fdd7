"""The state as flat words and back, on every mesh of eight devices; and through a host's memory."""

import contextlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma.checkpoint import snapshot
from gemma.config import Mesh, Program
from gemma.memory import slots
from gemma.memory.wire import Source
from gemma.model.sharding import make_mesh
from gemma.train.step import TrainState, functions
from gemma.train.trainer import Trainer
from orchestrator.hosts.keeper import Keeper
from tests.small_text import TEXTS, config, write_jsonl

MESHES = [Mesh(1, 8, 1), Mesh(2, 4, 1), Mesh(2, 2, 2), Mesh(4, 1, 2), Mesh(8, 1, 1)]


def same(one: TrainState, other: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other)), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_state_packed_and_unpacked_is_the_same_to_the_bit(program: Program, shape: Mesh) -> None:
    mesh = make_mesh(shape)
    made = functions(replace(program, mesh=shape), mesh)
    state = made.init()
    pack, unpack = snapshot.packing(made.state, mesh)
    share = snapshot.share_of(made.state, mesh)
    packed = pack(state)
    words = np.stack([np.asarray(part) for part in snapshot.parts_here(packed.words, mesh, share)])
    assert words.nbytes == share.bytes
    back, sums = unpack(snapshot.placed(words, snapshot.flat_shape(made.state, mesh), mesh, share))
    assert same(state, back)
    assert np.asarray(sums).tolist() == np.asarray(packed.sums).tolist()
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, state)


# An optimizer's moments in fewer bits, factored ones of odd sizes, an array without elements.
TYPES: list[Any] = [jnp.bfloat16, np.float16, np.int8, np.uint8, np.bool_, jnp.float8_e4m3fn, jnp.int4, np.float32]
CUTS = [PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(("fsdp", "tensor")), PartitionSpec("tensor", "fsdp")]
SHAPES = [(8, 7), (8, 1), (16, 24), (4, 2, 3), (8, 0)]


@pytest.mark.parametrize("shape", MESHES[1:4], ids=str)
def test_leaves_of_any_type_and_size_come_back_to_the_bit(shape: Mesh) -> None:
    draw = np.random.default_rng(0)
    mesh = make_mesh(shape)
    leaves = {}
    for dtype, cut, size in itertools.product(TYPES, CUTS, SHAPES):
        sharding = NamedSharding(mesh, cut)
        with contextlib.suppress(ValueError):  # not every size can be cut so
            sharding.shard_shape(size)
            values = draw.integers(-8 if dtype is jnp.int4 else 0, 8 if dtype is jnp.int4 else 2**31, size)
            whole = values.astype(dtype) if dtype in (jnp.int4, np.bool_) else draw.bytes(math.prod(size) * 4)
            if isinstance(whole, bytes):  # any bits, those of what is no number as well
                whole = np.frombuffer(whole, dtype)[: math.prod(size)].reshape(size)
            leaves[f"{jnp.dtype(dtype).name} {cut} {size}"] = jax.device_put(whole, sharding)
    assert len(leaves) > 60
    odd = jax.device_put(np.arange(5, dtype=np.int8), NamedSharding(mesh, PartitionSpec()))
    step = jax.device_put(np.int32(5), odd.sharding)
    state = TrainState(step, leaves, {"odd": odd}, odd.astype(jnp.bfloat16))  # type: ignore[arg-type]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    pack, unpack = snapshot.packing(abstract, mesh)
    packed = pack(state)
    assert packed.words.shape == snapshot.flat_shape(abstract, mesh).shape
    back, sums = unpack(packed.words)
    for name, one in leaves.items():
        other = back.params[name]
        assert (one.dtype, one.shape, one.sharding) == (other.dtype, other.shape, other.sharding)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), name
    assert same(state, back)
    assert np.asarray(sums).tolist() == np.asarray(packed.sums).tolist()


def test_packing_moves_nothing_between_devices(program: Program) -> None:
    mesh = make_mesh(Mesh(2, 2, 2))
    made = functions(replace(program, mesh=Mesh(2, 2, 2)), mesh)
    pack, unpack = snapshot.packing(made.state, mesh)
    flat = snapshot.flat_shape(made.state, mesh)
    for text in (pack.lower(made.state).compile().as_text(), unpack.lower(flat).compile().as_text()):
        assert not [word for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if word in text]


def test_replicas_share_their_bytes(program: Program) -> None:
    """A part a place along (fsdp, tensor), however many replicas lie on this host."""
    shares = []
    for shape in (Mesh(2, 2, 2), Mesh(1, 2, 2)):
        mesh = make_mesh(shape, jax.devices()[: 2 * shape.replica * 2])
        shares.append(snapshot.share_of(functions(replace(program, mesh=shape), mesh).state, mesh))
    assert shares[0].parts == shares[1].parts
    assert shares[0] == shares[1]


@pytest.mark.parametrize("change", ["fsdp", "model"])
def test_shares_of_other_layouts_have_other_keys(program: Program, change: str) -> None:
    mesh = make_mesh(Mesh(1, 4, 2))
    one = snapshot.share_of(functions(replace(program, mesh=Mesh(1, 4, 2)), mesh).state, mesh)
    if change == "fsdp":
        shape, other = Mesh(1, 2, 4), replace(program, model=replace(program.model, kv_heads=4))
    else:
        shape, other = Mesh(1, 4, 2), replace(program, model=replace(program.model, hidden=64))
    mesh = make_mesh(shape)
    assert snapshot.share_of(functions(replace(other, mesh=shape), mesh).state, mesh).key != one.key


@pytest.fixture
def trainer(program: Program, tmp_path: Path, compiled_programs: Path) -> Trainer:
    text = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    return Trainer(replace(program, data=config(text), mesh=Mesh(2, 2, 2)), tmp_path, compiled_programs)


def kept(trainer: Trainer) -> tuple[Keeper, str]:
    keeper = Keeper("127.0.0.1", math.inf)
    trainer.restore(None)
    trainer.keep(path := keeper.hold(trainer.share.key, trainer.share.bytes), None, 1)
    return keeper, path


def settled(trainer: Trainer) -> None:
    assert trainer.keeping is not None
    trainer.keeping.settle()


def test_steps_after_a_recovery_are_those_of_an_undisturbed_run_to_the_bit(trainer: Trainer) -> None:
    _, path = kept(trainer)
    trainer.run(0, 4, 0, 1)
    settled(trainer)
    rows = trainer.run(4, 8, 0, 0).rows
    state = jax.device_get(trainer.state)
    restored = trainer.restore(4, Source(path, None))
    again = trainer.run(4, 8, 0, 0).rows
    assert [row.metrics for row in again] == [row.metrics for row in rows]
    assert same(state, trainer.state)
    assert [row.step for row in restored.rows] == [1, 2, 3, 4]


def test_a_share_comes_over_the_network_as_well(trainer: Trainer) -> None:
    keeper, _ = kept(trainer)
    trainer.run(0, 3, 0, 1)
    settled(trainer)
    state = jax.device_get(trainer.state)
    trainer.restore(3, Source(None, keeper.address))
    assert same(state, trainer.state)


def flip(keeper: Keeper, key: str, step: int, at: int, notes: bool = False) -> None:
    """One bit of a snapshot, in the memory of a keeper."""
    held = keeper.server.memories[key].slots
    slot = slots.held(held)[step]
    if notes:
        held.memory[slots.start_of(held, slot) + slots.PAGE + at] ^= 1
    else:
        slots.share(held, slot)[at] ^= 1


@pytest.mark.parametrize("notes", [False, True], ids=["share", "notes"])
@pytest.mark.parametrize("far", [False, True], ids=["here", "network"])
def test_a_flipped_bit_is_seen_and_its_snapshot_not_offered_again(trainer: Trainer, far: bool, notes: bool) -> None:
    keeper, path = kept(trainer)
    trainer.run(0, 2, 0, 1)
    settled(trainer)
    state = jax.device_get(trainer.state)
    trainer.run(2, 3, 0, 1)
    settled(trainer)
    source = Source(None, keeper.address) if far else Source(path, None)
    flip(keeper, trainer.share.key, 3, 5 if notes else trainer.share.bytes // 2, notes)
    with pytest.raises(snapshot.SnapshotError, match="step 3"):
        trainer.restore(3, source)
    assert keeper.inventory().steps == {trainer.share.key: ((0, 1), (1, 1), (2, 1))}
    trainer.restore(2, source)
    assert same(state, trainer.state)


def test_a_bit_of_any_part_is_seen(trainer: Trainer) -> None:
    """Of every device's, its first and its last word."""
    keeper, path = kept(trainer)
    part = trainer.share.bytes // len(trainer.share.parts)
    assert len(trainer.share.parts) == 4
    for at in (at for index in range(4) for at in (index * part, (index + 1) * part - 1)):
        trainer.restore(None)
        trainer.run(0, 1, 0, 1)
        settled(trainer)
        flip(keeper, trainer.share.key, 1, at)
        with pytest.raises(snapshot.SnapshotError, match=f"part {at // part} "):
            trainer.restore(1, Source(path, None))


def test_a_snapshot_that_holds_another_step_than_it_says_is_refused(trainer: Trainer) -> None:
    keeper, path = kept(trainer)
    trainer.run(0, 3, 0, 1)
    settled(trainer)
    held = keeper.server.memories[trainer.share.key].slots
    slot, written = slots.held(held)[3], slots.raw_notes(held, 3)
    slots.mark(held, slot, 7, written)
    with pytest.raises(snapshot.SnapshotError, match="it holds step 3"):
        trainer.restore(7, Source(path, None))


def test_a_buddy_holds_what_this_host_holds(trainer: Trainer) -> None:
    here, there = Keeper("127.0.0.1", math.inf), Keeper("127.0.0.1", math.inf)
    trainer.restore(None)
    trainer.keep(here.hold(trainer.share.key, trainer.share.bytes), there.address, 1)
    trainer.run(0, 3, 0, 1)
    settled(trainer)
    assert here.inventory().steps == there.inventory().steps == {trainer.share.key: ((0, 1), (1, 1), (2, 1), (3, 1))}


def test_a_buddy_that_is_gone_stops_neither_training_nor_the_snapshots_here(trainer: Trainer) -> None:
    here, there = Keeper("127.0.0.1", math.inf), Keeper("127.0.0.1", math.inf)
    trainer.restore(None)
    trainer.keep(here.hold(trainer.share.key, trainer.share.bytes), replace(there.address, port=1), 1)
    assert len(trainer.run(0, 3, 0, 1).rows) == 3
    settled(trainer)
    assert here.inventory().steps == {trainer.share.key: ((0, 1), (1, 1), (2, 1), (3, 1))}


def test_a_snapshot_each_so_many_steps(trainer: Trainer) -> None:
    keeper, _ = kept(trainer)
    assert trainer.run(0, 9, 0, 4).snapshots == 2
    settled(trainer)
    assert keeper.inventory().steps == {trainer.share.key: ((0, 1), (4, 1), (8, 1))}


def test_a_snapshot_that_is_gone_is_named(trainer: Trainer) -> None:
    _, path = kept(trainer)
    with pytest.raises(snapshot.SnapshotError, match="step 99"):
        trainer.restore(99, Source(path, None))


def test_results_that_were_told_are_not_noted_again(trainer: Trainer) -> None:
    _, path = kept(trainer)
    trainer.run(0, 3, 0, 1)
    trainer.run(3, 5, 2, 1)
    settled(trainer)
    assert [row.step for row in trainer.restore(5, Source(path, None)).rows] == [3, 4, 5]


def test_a_bad_state_is_never_snapshot(trainer: Trainer) -> None:
    keeper, _ = kept(trainer)
    trainer.run(0, 2, 0, 1)
    trainer.poison()
    ran = trainer.run(2, 9, 0, 1)
    settled(trainer)
    assert keeper.inventory().steps == {trainer.share.key: ((0, 1), (1, 1), (2, 1))}
    assert ran.halted
    assert [bad.step for bad in ran.bad] == [3, 4, 5]


def test_where_a_copy_has_no_room_beside_a_step_training_waits_for_it_and_is_the_same(trainer: Trainer) -> None:
    keeper, path = kept(trainer)
    trainer.beside = False
    rows = trainer.run(0, 4, 0, 1).rows
    assert keeper.inventory().steps == {trainer.share.key: ((1, 1), (2, 1), (3, 1), (4, 1))}
    saved = jax.device_get(trainer.state)
    trainer.save(4)
    trainer.run(4, 6, 0, 1)  # takes the arrays that were saved
    assert trainer.wait(60)
    assert trainer.trouble() is None
    trainer.restore(4)
    assert same(saved, trainer.state)
    trainer.beside = True
    trainer.restore(None)
    assert [row.metrics for row in trainer.run(0, 4, 0, 1).rows] == [row.metrics for row in rows]
