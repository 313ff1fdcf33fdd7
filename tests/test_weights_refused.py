"""Weights that cannot be used: one line that names the tensor or the key, exit code 1, nothing left behind."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma.config import ConfigError
from gemma.digest import seal
from gemma.model.load import load_hf
from gemma.weights.sources import check_model
from launch.convert import work
from tests import hf_cases
from tests.test_bad_input import everything, refused

TOP = Path(__file__).parents[1]
UP = "model.layers.2.mlp.up_proj.weight"
FILE = "model.safetensors"


def edited(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    held = load_file(folder / FILE)
    change(held)
    save_file(held, folder / FILE)


def set_config(**values: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def drop_config(key: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return write


def truncate(file: str, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - by)


def index_without_its_file(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "model-1.safetensors"}}))


def head(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + np.float32(value)})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: edited(f, lambda h: h.pop(UP)), f"{UP} is missing"),
    "extra": (
        lambda f: edited(f, lambda h: h.update({"model.layers.4.x": np.zeros(3, np.float32)})),
        "model.layers.4.x is not a tensor of this model",
    ),
    "misshapen": (
        lambda f: edited(f, lambda h: h.update({UP: np.ascontiguousarray(h[UP].T)})),
        f"{UP} is [20, 28], the model's is [28, 20]",
    ),
    "other-dtype": (lambda f: edited(f, lambda h: h.update({UP: h[UP].astype(np.float16)})), f"{UP} is F16"),
    "unread-dtype": (lambda f: edited(f, lambda h: h.update({UP: h[UP].astype(np.int32)})), f"{UP} is I32"),
    "own-output-layer": (lambda f: edited(f, head(1)), "lm_head.weight differs from model.embed_tokens.weight"),
    "truncated": (truncate(FILE, 1), f"{FILE} is cut off"),
    "header-only": (truncate(FILE, 30000), f"{FILE} is cut off"),
    "no-weights": (lambda f: (f / FILE).unlink(), f"neither {FILE} nor model.safetensors.index.json"),
    "index-only": (index_without_its_file, f"puts {UP} into model-1.safetensors, which is missing"),
    "no-json": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "llama": (set_config(architectures=["LlamaForCausalLM"]), "architectures=['LlamaForCausalLM']: only Gemma2"),
    "gemma1": (set_config(model_type="gemma"), "model_type=gemma"),
    "no-attention-cap": (set_config(attn_logit_softcapping=None), "attn_logit_softcapping=None: must be"),
    "no-final-cap": (set_config(final_logit_softcapping=None), "final_logit_softcapping=None"),
    "no-window": (set_config(sliding_window=None), "sliding_window=None"),
    "no-head-size": (drop_config("head_dim"), "head_dim=missing"),
    "untied": (set_config(tie_word_embeddings=False), "tie_word_embeddings=False"),
    "bias": (set_config(attention_bias=True), "attention_bias=True"),
    "gelu": (set_config(hidden_activation="gelu"), "hidden_activation=gelu"),
    "quantised": (set_config(quantization_config={"bits": 4}), "quantization_config="),
    "scaled-rope": (
        set_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        "rope_parameters: rope_type=linear",
    ),
    "global-first": (
        set_config(layer_types=["full_attention", "sliding_attention"] * 2),
        "layer_types=['full_attention', 'sliding_attention', 'full_attention', 'sliding_attention']: must alternate",
    ),
    "odd-layers": (set_config(num_hidden_layers=3), "num_hidden_layers=3: must be even"),
    "endless-layers": (set_config(num_hidden_layers=10**12), "num_hidden_layers=1000000000000: must be at most 1,000"),
    "endless-scale": (set_config(query_pre_attn_scalar=10**400), "query_pre_attn_scalar=an integer of 1329 bits"),
    "endless-vocabulary": (set_config(vocab_size=10**400), "vocab_size=an integer of 1329 bits: must be at most"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
    "long": (lambda f: (f / "config.json").write_text(" " * 2_000_000), "config.json: 2,000,000 bytes"),
    "fewer-rows": (set_config(vocab_size=36), "model.embed_tokens.weight is [37, 20], the model's is [36, 20]"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_before_anything_is_written(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, expected = DAMAGES[damage]
    change(folder)
    before = everything(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", f"from={folder}", f"to={tmp_path}/out"])
    with pytest.raises(ConfigError) as by_command:
        work()
    with pytest.raises(ConfigError) as by_call:
        load_hf(folder)
    with pytest.raises(ConfigError) as by_run:
        check_model("train.init_from", str(folder), hf_cases.SMALL)
    for error, key in ((by_command, f"from={folder}: "), (by_call, f"{folder}"), (by_run, "train.init_from=")):
        assert expected in str(error.value)
        assert key in str(error.value)
        assert "\n" not in str(error.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    value: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(held: dict[str, np.ndarray]) -> None:
        held[UP] = held[UP].copy()
        held[UP][3, 5] = value

    edited(folder, spoil)
    before = everything(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", f"from={folder}", f"to={tmp_path}/out"])
    with pytest.raises(ConfigError, match=f"{UP} is not finite: {value}"):
        work()
    with pytest.raises(ConfigError, match=f"{UP} is not finite"):
        load_hf(folder)
    assert everything(tmp_path) == before


def test_an_output_layer_that_repeats_the_embedding_is_read(folder: Path) -> None:
    edited(folder, head(0))
    load_hf(folder)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "from: missing; give from=PATH and to=PATH"),
        ("from=hf", "to: missing"),
        ("from=nowhere to=out", "from=nowhere: no such file"),
        ("from=runs to=out", "from=runs: holds no weights; allowed is a Hugging Face folder"),
        ("from=hf to=hf", "to=hf: exists"),
        ("from=hf to=no/where", "to=no/where: "),
        ("from=hf to=out format=gguf", "format=gguf: allowed are checkpoint, hf, released"),
        ("from=hf to=out dtype=int8", "dtype=int8: allowed are float32, bfloat16, float16"),
        ("from=hf to=out vocab=many", "vocab=many: must be a whole number above 0"),
        ("from=hf to=out step=3", "from=hf: step=3: only a run directory has steps"),
        ("from=hf to=out model=huge", "model=huge: no such choice; allowed: gemma2_27b"),
        ("from=hf to=out tokenizer=none", "tokenizer=none: no such folder"),
        ("from=hf to=out frob=1", "frob: unknown key; allowed: from, to"),
        ("from=hf to=out --frob", "--frob: not an override"),
        ("from=empty to=out", "from=empty: a run without a checkpoint yet"),
    ],
)
def test_convert_refuses_in_one_line(folder: Path, arguments: str, expected: str) -> None:
    place = folder.parent
    (place / "runs").mkdir()
    (place / "empty").mkdir()
    manifest = {"config": seal({"model": vars(hf_cases.SMALL)})}
    (place / "empty" / "manifest.json").write_text(json.dumps(manifest))
    refused(place, "convert", arguments, expected)


@pytest.mark.parametrize(
    ("file", "expected"), [("_METADATA", "no Orbax checkpoint"), ("manifest.ocdbt", "embedding_VD cannot be read")]
)
def test_a_checkpoint_that_lost_a_file_is_refused(
    file: str, expected: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", f"from={folder}", f"to={tmp_path}/ours"])
    work()
    (tmp_path / "ours" / "checkpoint" / file).unlink()
    monkeypatch.setattr(sys, "argv", ["convert", f"from={tmp_path}/ours", f"to={tmp_path}/out"])
    with pytest.raises(ConfigError, match=expected if file == "_METADATA" else "cannot be read"):
        work()
    assert not (tmp_path / "out").exists()


def test_data_lost_from_a_checkpoint_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", f"from={folder}", f"to={tmp_path}/ours"])
    work()
    for path in (tmp_path / "ours" / "checkpoint" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    before = everything(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", f"from={tmp_path}/ours", f"to={tmp_path}/out"])
    with pytest.raises(ConfigError) as refusal:
        work()
    assert "\n" not in str(refusal.value)
    assert everything(tmp_path) == before
