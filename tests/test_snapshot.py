"""The state as flat words and back, on every mesh of eight devices; and through a host's memory."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma.checkpoint import snapshot
from gemma.config import Mesh, Program
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
    parts = snapshot.parts_here(pack(state), mesh, share)
    words = np.stack([np.asarray(part) for part in parts])
    assert words.nbytes == share.bytes
    back = unpack(snapshot.placed(words, snapshot.flat_shape(made.state, mesh), mesh, share))
    assert same(state, back)
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, state)


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
def trainer(program: Program, tmp_path: Path) -> Trainer:
    text = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    return Trainer(replace(program, data=config(text), mesh=Mesh(2, 2, 2)), tmp_path, tmp_path / "cache")


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


def test_a_buddy_holds_what_this_host_holds(trainer: Trainer) -> None:
    here, there = Keeper("127.0.0.1", math.inf), Keeper("127.0.0.1", math.inf)
    trainer.restore(None)
    trainer.keep(here.hold(trainer.share.key, trainer.share.bytes), there.address, 1)
    trainer.run(0, 3, 0, 1)
    settled(trainer)
    assert here.inventory().steps == there.inventory().steps == {trainer.share.key: ((0, 1), (1, 1), (2, 1), (3, 1))}


def test_a_buddy_that_is_gone_stops_neither_training_nor_the_snapshots_here(trainer: Trainer) -> None:
    here, there = Keeper("127.0.0.1", math.inf), Keeper("127.0.0.1", math.inf)
    there.listener.close()
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
