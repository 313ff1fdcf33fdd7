"""train.init_from: a run starts from weights that lie somewhere, cut over its mesh, with a fresh optimizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gemma.config import ConfigError, Mesh, Model, Program
from gemma.model.sharding import make_mesh
from gemma.train.step import TrainState, functions
from gemma.train.trainer import Trainer
from gemma.weights import convert, layout
from gemma.weights.sources import Source, check_model, open_source
from tests import hf_cases

ROWS = 40  # of the run's embedding; the weights have 37


def initial(program: Program, cache: Path) -> TrainState:
    """What `Trainer.restore(None)` starts with, without the data and the train step."""
    trainer = object.__new__(Trainer)
    trainer.program, trainer.cache = program, cache
    trainer.functions, trainer.packing = functions(program, make_mesh(program.mesh)), {}
    return trainer.initial()


def from_weights(program: Program, path: Path) -> Program:
    train = replace(program.train, init_from=str(path))
    return replace(program, model=replace(hf_cases.SMALL, vocab=ROWS), mesh=Mesh(1, 4, 2), train=train)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL, "bfloat16")


@pytest.fixture
def imported(hf: Path, tmp_path: Path) -> Path:
    with convert.whole(tmp_path / "ours") as out:
        convert.write_checkpoint(open_source(hf), out)
    return tmp_path / "ours"


@pytest.mark.parametrize("kind", ["hf", "imported"])
def test_a_run_starts_from_the_weights_bit_for_bit(
    kind: str, program: Program, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    state = initial(from_weights(program, path), tmp_path / "cache")
    params, source = flatten_dict(state.params, sep="."), open_source(path)
    assert {(x.dtype.name, len(x.addressable_shards)) for x in params.values()} == {("float32", 8)}
    for place in layout.places(source.model, layout.HF):
        want = source.read(place.slot).astype(np.float32)
        got = np.asarray(params[place.slot.leaf][place.slot.index])
        np.testing.assert_array_equal(got[:37] if place.slot.leaf == layout.EMBEDDING else got, want)
    assert not np.asarray(params[layout.EMBEDDING][37:]).any()
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))
    assert int(state.step) == 0


def test_the_devices_together_ask_for_each_weight_once(
    program: Program, imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a host asks for what its devices hold, and no more."""
    from gemma.model import load

    asked: list[int] = []
    share = load.share

    def counted(source: Source, slot: layout.Slot, index: tuple[slice, ...]) -> np.ndarray:
        found = share(source, slot, index)
        asked.append(found.size)
        return found

    monkeypatch.setattr(load, "share", counted)
    config = from_weights(program, imported)
    abstract = functions(config, make_mesh(config.mesh)).state.params
    load.load_params(str(imported), abstract)
    rest = {leaf: x for leaf, x in flatten_dict(abstract, sep=".").items() if leaf != layout.EMBEDDING}
    assert sum(asked) == sum(int(np.prod(x.shape)) for x in rest.values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: replace(m, width=40), "model.width=40: train.init_from={path} has model.width=20"),
        (lambda m: replace(m, layers=2), "model.layers=2: train.init_from={path} has model.layers=4"),
        (lambda m: replace(m, window=4), "model.window=4: train.init_from={path} has model.window=3"),
        (lambda m: replace(m, final_cap=30.0), "model.final_cap=30.0: train.init_from={path} has model.final_cap=3.0"),
        (lambda m: replace(m, query_scale=0.4), "model.query_scale=0.4: train.init_from={path} has model.query_scale"),
        (lambda m: replace(m, vocab=36), "model.vocab=36: train.init_from={path} has 37 rows; allowed: at least"),
    ],
)
def test_weights_of_another_model_are_refused(change: Callable[[Model], Model], expected: str, hf: Path) -> None:
    check_model("train.init_from", str(hf), replace(hf_cases.SMALL, vocab=ROWS, name="other"))
    with pytest.raises(ConfigError) as refusal:
        check_model("train.init_from", str(hf), change(hf_cases.SMALL))
    assert str(refusal.value).startswith(expected.format(path=hf))


def test_released_weights_are_refused_as_they_name_no_model(hf: Path, tmp_path: Path) -> None:
    with convert.whole(tmp_path / "flax") as out:
        convert.write_released(open_source(hf), out, "FD")
    with pytest.raises(ConfigError, match="does not say of which model it is; launch.convert"):
        check_model("train.init_from", str(tmp_path / "flax"), hf_cases.SMALL)
