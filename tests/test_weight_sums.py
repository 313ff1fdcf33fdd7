"""Weights are taken from a checkpoint only as they were saved: the sums that `resume` looks at, at the other doors."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gemma.checkpoint import disk
from gemma.config import ConfigError, Mesh
from gemma.digest import seal, unseal
from gemma.model import load
from gemma.model.transformer import Gemma
from gemma.weights import sums
from gemma.weights.arrays import open_arrays
from gemma.weights.layout import WeightsError
from launch import convert as command
from tests import hf_cases
from tests.test_integrity import STEP, config
from tests.test_sums import placed, state

RUN_BYTES = 64  # so that even small arrays are cut into several runs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    summing, put = placed(state(), Mesh(1, 4, 2))
    with disk.open_manager(folder, config()) as manager:
        disk.save(manager, STEP, put, summing(put))
        manager.wait_until_finished()
    return folder / str(STEP) / "default"


def arrays(folder: Path) -> dict[str, object]:
    stored = open_arrays(folder)
    return {".".join(name[1:]): stored.open(name) for name in sorted(stored.names) if name[0] == "params"}


def test_numpy_s_sums_are_those_of_the_devices(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "RUN_BYTES", RUN_BYTES)
    noted, found = sums.noted(saved), arrays(saved)
    assert found
    for leaf, array in found.items():
        assert sums.sum_of(array, leaf) == noted[f"params.{leaf}"], leaf
    sums.check(saved, found, "params")


def test_a_changed_byte_of_any_array_file_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    """Every tenth of each file's bytes; what TensorStore itself refuses is refused too."""
    refused = 0
    files = [path.relative_to(saved.parent) for path in saved.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for name in files:
        whole = (saved.parent / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 10)):
            copy = Path(shutil.copytree(saved.parent, tmp_path / f"{name.name}-{at}"))
            (copy / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            try:
                sums.check(copy / "default", arrays(copy / "default"), "params")
            except WeightsError:
                refused += 1
                continue
            intact = sums.noted(copy / "default")
            for leaf, array in arrays(copy / "default").items():
                assert sums.sum_of(array, leaf) == intact[f"params.{leaf}"]
    assert refused > 0


def test_a_note_that_cannot_be_read_is_refused(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved.parent, tmp_path / "copy"))
    (copy / sums.METADATA).write_text("{")
    with pytest.raises(WeightsError, match=sums.METADATA):
        sums.check(copy / "default", arrays(copy / "default"), "params")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What launch.convert makes of a Hugging Face folder."""
    place = tmp_path_factory.mktemp("weights")
    convert(place / "ours", hf_cases.write_folder(place / "hf", hf_cases.SMALL))
    return place / "ours"


def convert(out: Path, source: Path, *more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert", f"from={source}", f"to={out}", *more])
        assert command.work() == 0


def abstract(dtype: str = "float32", vocab: int = hf_cases.SMALL.vocab) -> Any:
    """The parameters of a training program on one device."""
    model = replace(hf_cases.SMALL, vocab=vocab)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Gemma(model, rngs=nnx.Rngs(0)))))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("replica", "fsdp", "tensor"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes)


def spoilt(imported: Path, tmp_path: Path) -> Path:
    """With one bit of an array changed."""
    copy = Path(shutil.copytree(imported, tmp_path / "spoilt"))
    stored = open_arrays(copy / "checkpoint")
    array = stored.open(max(stored.names))
    first = np.asarray(array[..., :1].read().result())
    array[..., :1].write((first.view(np.uint32) ^ 1).view(np.float32)).result()
    return copy


DOORS = {
    "convert": lambda path: convert(path.with_name("out"), path),
    "as-stored": lambda path: load.load_params(str(path), abstract()),
    "cast": lambda path: load.load_params(str(path), abstract("bfloat16")),
    "more-rows": lambda path: load.load_params(str(path), abstract(vocab=hf_cases.SMALL.vocab + 3)),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_what_was_saved_and_refuses_a_flipped_bit(door: str, imported: Path, tmp_path: Path) -> None:
    DOORS[door](Path(shutil.copytree(imported, tmp_path / "sound")))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(WeightsError if door != "convert" else ConfigError, match="not what was saved|cannot be read"):
        DOORS[door](spoilt(imported, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("text", [None, "{}", '{"custom_metadata": {"sums": {}}}', "[" * 100_000])
def test_weights_without_checksums_are_refused(door: str, text: str | None, imported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(imported, tmp_path / "copy"))
    (copy / sums.METADATA).unlink()
    if text is not None:
        (copy / sums.METADATA).write_text(text)
    with pytest.raises(ConfigError, match=sums.METADATA):
        DOORS[door](copy)


def test_a_cast_that_does_not_hold_the_values_is_refused(tmp_path: Path) -> None:
    folder = hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL)
    held = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    held[name] = held[name] + np.float32(1e5)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{name} is not finite: inf"):
        convert(tmp_path / "out", folder, "dtype=float16")


def test_a_flipped_digit_of_model_json_is_no_other_model(imported: Path, tmp_path: Path) -> None:
    """The window, the caps and the epsilon show in no shape and in no array."""
    copy = Path(shutil.copytree(imported, tmp_path / "copy"))
    text = (copy / "model.json").read_text()
    for key in ("window", "norm_eps", "attention_cap"):
        value = f'"{key}": {json.loads(text)[key]}'
        assert value in text
        (copy / "model.json").write_text(text.replace(value, value[:-1] + ("3" if value[-1] != "3" else "5")))
        with pytest.raises(ConfigError, match="model.json: its content is not what was written"):
            convert(tmp_path / "out", copy)
        with pytest.raises(WeightsError, match="model.json: its content is not what was written"):
            load.load_params(str(copy), abstract())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 10**12}, "model.layers=1000000000000: must be at most 1000"),
        ({"vocab": 10**400}, "its model cannot be read"),
        ({"query_scale": 1e999}, "must be above 0, and finite"),
    ],
)
def test_a_model_json_is_bounded_before_it_is_used(
    change: dict[str, Any], said: str, imported: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(imported, tmp_path / "copy"))
    found = unseal(json.loads((copy / "model.json").read_text()))
    (copy / "model.json").write_text(json.dumps(seal(found | change)))
    with pytest.raises(ConfigError, match=said) as refused:
        convert(tmp_path / "out", copy)
    assert len(str(refused.value)) < 600
