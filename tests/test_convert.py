"""launch.convert: every form into every other, bit for bit; what is wrong is named and nothing is left."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from gemma.model.load import load_hf
from gemma.weights import convert, layout
from gemma.weights.sources import DTYPES, Resized, Source, open_source
from launch.convert import work
from tests import hf_cases

TOP = Path(__file__).parents[1]
CASES = {**hf_cases.CASES, "width-is-hidden": replace(hf_cases.SMALL, hidden=hf_cases.SMALL.width)}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    assert work() == 0


def assert_same(one: Source, other: Source) -> None:
    for place in layout.places(one.model, layout.HF):
        first, second = one.read(place.slot), other.read(place.slot)
        assert (first.dtype, first.shape) == (second.dtype, second.shape), place
        assert first.tobytes() == second.tobytes(), place


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("files", [1, 3])
def test_import_export_import_is_bitwise(
    files: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL, dtype, files)
    run(monkeypatch, f"from={start}", f"to={tmp_path}/one")
    run(monkeypatch, f"from={tmp_path}/one", f"to={tmp_path}/back", *(["shard_gb=2e-5"] if files > 1 else []))
    run(monkeypatch, f"from={tmp_path}/back", f"to={tmp_path}/two")
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) > 1) == (files > 1)
    first, back = tensors(start), tensors(tmp_path / "back")
    assert first.keys() == back.keys()
    assert all(first[name].dtype == back[name].dtype == DTYPES[dtype] for name in first)
    assert all(first[name].tobytes() == back[name].tobytes() for name in first)
    assert_same(open_source(tmp_path / "one"), open_source(tmp_path / "two"))


@pytest.mark.parametrize("gating", ["DF", "FD"])
@pytest.mark.parametrize("case", CASES)
def test_the_released_layout_holds_the_same_weights(case: str, gating: str, tmp_path: Path) -> None:
    model = CASES[case]
    source = open_source(hf_cases.write_folder(tmp_path / "hf", model, "bfloat16"))
    with convert.whole(tmp_path / "flax") as out:
        convert.write_released(source, out, gating)
    given = gating if model.width == model.hidden else None
    assert_same(source, open_source(tmp_path / "flax", model=model, gating=given))


@pytest.mark.parametrize("gating", ["DF", "FD"])
def test_released_tensors_have_the_released_names_and_shapes(gating: str, tmp_path: Path) -> None:
    """google-deepmind/gemma, gm/nn/_modules.py: [2, D, F] where transpose_gating_einsum is off, else [2, F, D]."""
    source = open_source(hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL))
    with convert.whole(tmp_path / "flax") as out:
        convert.write_released(source, out, gating)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "flax")
    layer = {name.removeprefix("transformer/layer_3/"): value for name, value in tree.items() if "layer_3" in name}
    shapes = {name: next(iter(value.values())).shape for name, value in layer.items()}
    assert shapes == {
        "attn/q_einsum": (4, 20, 6),
        "attn/kv_einsum": (2, 2, 20, 6),
        "attn/attn_vec_einsum": (4, 6, 20),
        "mlp/gating_einsum": (2, 20, 28) if gating == "DF" else (2, 28, 20),
        "mlp/linear": (28, 20),
        **dict.fromkeys(("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"), (20,)),
    }
    up = hf_cases.tensors(hf_cases.SMALL)["model.layers.3.mlp.up_proj.weight"]
    np.testing.assert_array_equal(layer["mlp/gating_einsum"]["w"][1], up.T if gating == "DF" else up)
    assert tree["transformer/embedder"]["input_embedding"].shape == (37, 20)


def test_a_tree_as_google_deepmind_gemma_saves_it_is_read_too(tmp_path: Path) -> None:
    model = hf_cases.SMALL
    source = open_source(hf_cases.write_folder(tmp_path / "hf", model))
    table = layout.released(model, "FD")
    tree: dict = {}
    for name, shape in layout.tensor_shapes(model, table).items():
        places = [p for p in layout.places(model, table) if p.tensor == name]
        parts = [layout.to_stored(model, p, source.read(p.slot)) for p in places]
        *path, last = name.removeprefix("transformer/").replace("gating_einsum/w", "gating_einsum").split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = np.stack(parts).reshape(shape)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nested", tree)
    assert_same(source, open_source(tmp_path / "nested", model=model))


def test_orbax_restores_an_imported_checkpoint_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL, "bfloat16")
    run(monkeypatch, f"from={folder}", f"to={tmp_path}/ours")
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(tmp_path / "ours" / "checkpoint")["params"]
    down = tensors(folder)["model.layers.3.mlp.down_proj.weight"]
    assert params["pairs"]["global_block"]["down_PFD"][1].tobytes() == np.ascontiguousarray(down.T).tobytes()


def test_rows_are_padded_with_zeros_and_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL)
    run(monkeypatch, f"from={start}", f"to={tmp_path}/more", "vocab=50")
    more = open_source(tmp_path / "more")
    embedding_VD = more.read(layout.Slot(layout.EMBEDDING, ()))
    assert embedding_VD.shape == (50, 20)
    assert not embedding_VD[37:].any()
    assert_same(Resized(more, 37), open_source(start))
    run(monkeypatch, f"from={tmp_path}/more", f"to={tmp_path}/cut", "vocab=37")
    assert_same(open_source(tmp_path / "cut"), open_source(start))


def test_the_tokenizer_comes_back_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = hf_cases.write_folder(tmp_path / "hf", hf_cases.SMALL)
    held = {"tokenizer.model": "pieces", "tokenizer_config.json": "{}", "generation_config.json": '{"eos_token_id": 9}'}
    for name, text in held.items():
        (start / name).write_text(text)
    run(monkeypatch, f"from={start}", f"to={tmp_path}/ours")
    run(monkeypatch, f"from={tmp_path}/ours", f"to={tmp_path}/back")
    assert {name: (tmp_path / "back" / name).read_text() for name in held} == held


def test_transformers_loads_an_exported_folder_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = hf_cases.CASES["groups-of-four"]
    run(monkeypatch, f"from={hf_cases.write_folder(tmp_path / 'hf', model)}", f"to={tmp_path}/ours")
    run(monkeypatch, f"from={tmp_path}/ours", f"to={tmp_path}/back", "shard_gb=1e-5")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BT = hf_cases.tokens(model)
    with torch.no_grad():
        want_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(load_hf(tmp_path / "back")(tokens_BT), want_BTV, atol=1e-4, rtol=0)
    assert theirs.generation_config.bos_token_id == 2
