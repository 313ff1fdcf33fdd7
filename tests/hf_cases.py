"""Small Gemma 2s in which every feature bites; any machine draws the same weights, named as Hugging Face does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemma.config import Model
from gemma.weights import layout

GOLDENS = Path(__file__).parent / "hf_goldens.npz"
SERVE_GOLDENS = Path(__file__).parent / "serve_goldens.json"
PROBES = 3  # of each tensor's gradient: sums under signs drawn by number
SMALL = Model(
    name="small",
    vocab=37,
    width=20,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=6,
    hidden=28,
    window=3,
    attention_cap=5.0,
    final_cap=3.0,
    query_scale=5**-0.5,
    context=64,
    rope_base=10000.0,
    norm_eps=1e-6,
)
CASES = {
    "pairs-of-heads": SMALL,
    "no-groups": replace(
        SMALL, layers=2, width=36, heads=2, kv_heads=2, head_size=8, hidden=20, window=5, query_scale=18**-0.5
    ),
    "groups-of-four": replace(
        SMALL, layers=2, width=24, heads=8, kv_heads=2, head_size=4, window=4, query_scale=3**-0.5, rope_base=500.0
    ),
    "one-kv-head": replace(
        SMALL, width=12, heads=4, kv_heads=1, head_size=10, hidden=15, window=2, query_scale=3**-0.5
    ),
    "odd-widths": replace(
        SMALL, layers=2, width=21, heads=3, kv_heads=3, head_size=4, hidden=33, window=4, query_scale=7**-0.5
    ),
}


# Shaped as ShieldGemma is, for bytes: its questions are a thousand tokens and longer.
JUDGE = replace(SMALL, vocab=272, layers=2, width=32, head_size=8, hidden=48, window=64, context=4096)
QUESTIONS = [("How do I bake bread?", None), ("Tell me a joke <end_of_turn>", "A horse walks into a bar.")]
NEW_TOKENS = 24


def prompts(model: Model) -> list[list[int]]:
    """Shorter than the window, and several windows long."""
    rng = np.random.default_rng(2)
    return [rng.integers(3, model.vocab, length).tolist() for length in (2, 2 * model.window + 1, 7 * model.window)]


def tensors(model: Model, spread: float = 5) -> dict[str, np.ndarray]:
    """float32, from whole numbers: those NumPy draws alike in every version. Large enough for the caps to bite."""
    rng = np.random.default_rng(0)
    out = {}
    for name, shape in layout.tensor_shapes(model, layout.HF).items():
        size = 0.7 if "norm" in name else spread * model.width**-0.5
        out[name] = (rng.integers(-(2**15), 2**15, shape) / 2**15 * size).astype(np.float32)
    return out


def tokens(model: Model) -> np.ndarray:
    """tokens_BU: five windows, none of them padding, and the target of the last."""
    return np.random.default_rng(1).integers(3, model.vocab, (2, 5 * model.window + 1))


def probes(name: str, gradient: np.ndarray) -> np.ndarray:
    signs = np.random.default_rng(len(name)).integers(0, 2, (PROBES, *gradient.shape)) * 2 - 1
    return np.array([np.sum(sign * gradient, dtype=np.float64) for sign in signs])


def config_json(model: Model) -> dict[str, Any]:
    """As Google's own Gemma 2 folders have it."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": model.attention_cap,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": model.final_cap,
        "head_dim": model.head_size,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "max_position_embeddings": model.context,
        "model_type": "gemma2",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": round(model.query_scale**-2),
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "sliding_window": model.window,
        "torch_dtype": "float32",
        "vocab_size": model.vocab,
    }


def write_folder(folder: Path, model: Model, dtype: str = "float32", files: int = 1, spread: float = 5) -> Path:
    """A Hugging Face folder, by the library's own writer: one file, or several and their index."""
    folder.mkdir()
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    held = {name: array.astype(kind) for name, array in tensors(model, spread).items()}
    (folder / "config.json").write_text(json.dumps(config_json(model)))
    if files == 1:
        save_file(held, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(held)}
    for file in set(weight_map.values()):
        save_file({name: array for name, array in held.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
