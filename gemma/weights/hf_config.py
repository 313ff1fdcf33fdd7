"""config.json of Hugging Face's Gemma2ForCausalLM, to our Model and back. Plain: no JAX, no weights."""

import json
from pathlib import Path
from typing import Any

from gemma.config import ConfigError, Model
from gemma.weights.layout import WeightsError
from gemma.weights.small_json import read_json, shown

ARCHITECTURE = "Gemma2ForCausalLM"
GELU = "gelu_pytorch_tanh"
# Their names for our numbers. Their window means what ours means: a query sees itself and sliding_window - 1 tokens
# before it (transformers 5.23, masking_utils.sliding_window_overlay: kv > q - sliding_window).
WHOLE = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "intermediate_size": "hidden",
    "sliding_window": "window",
    "max_position_embeddings": "context",
}
REAL = {
    "attn_logit_softcapping": "attention_cap",
    "final_logit_softcapping": "final_cap",
    "rms_norm_eps": "norm_eps",
}
MOST_BYTES = 1 << 20  # of config.json
LARGEST = 2**31 - 1  # of a number in it, but for these
MOST = {"num_hidden_layers": 1000, "num_attention_heads": 65536, "num_key_value_heads": 65536, "head_dim": 65536}
# What Gemma 2 is not, or what we do not do: a key that is there must have one of these values.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gemma2",),
    "hidden_activation": (GELU, None),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, False),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def read(folder: Path) -> Model:
    """The Model a folder's config.json describes, named after the folder.

    Raises WeightsError naming the key for every architecture, option or value that is not Gemma 2.
    """
    path = folder / "config.json"
    found = read_json(path, MOST_BYTES)
    if not isinstance(found, dict):
        raise WeightsError(f"{path.name}: must be a JSON object")
    architectures = found.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE]:
        raise WeightsError(f"{path.name}: architectures={shown(architectures)}: only {ARCHITECTURE} is read")
    for key, allowed in FIXED.items():
        value = found.get(key, allowed[0])
        if value not in allowed:
            raise WeightsError(f"{path.name}: {key}={shown(value)}: Gemma 2 has {key}={json.dumps(allowed[0])}")
    values: dict[str, Any] = {ours: number(path, found, theirs, whole=True) for theirs, ours in WHOLE.items()}
    values |= {ours: number(path, found, theirs) for theirs, ours in REAL.items()}
    scale = number(path, found, "query_pre_attn_scalar") ** -0.5
    check_layers(path, found, values["layers"])
    base = rope_base(path, found)
    try:
        return Model(name=folder.absolute().name, query_scale=scale, rope_base=base, **values)
    except ConfigError as error:
        raise WeightsError(f"{path.name}: makes {error}") from error


def number(path: Path, found: dict[str, Any], key: str, *, whole: bool = False) -> Any:
    """A value above 0. Raises WeightsError where it is missing, null (a cap that is off, say) or something else."""
    value = found.get(key, "missing")
    ok = isinstance(value, int) or isinstance(value, float) and (not whole or value.is_integer())
    if isinstance(value, bool) or not ok or not value > 0:
        raise WeightsError(f"{path.name}: {key}={shown(value)}: must be a {'whole ' if whole else ''}number above 0")
    most = MOST.get(key, LARGEST)
    if not value <= most:  # before it is used: a list of layers may be as long as it says
        raise WeightsError(f"{path.name}: {key}={shown(value)}: must be at most {most:,}")
    return int(value) if whole else float(value)


def check_layers(path: Path, found: dict[str, Any], layers: int) -> None:
    """Local and global layers alternate, local first; where the key is absent that is what it means."""
    alternating = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    if found.get("layer_types", alternating) not in (alternating, None):
        raise WeightsError(
            f"{path.name}: layer_types={shown(found['layer_types'])}: must alternate, sliding_attention first"
        )
    if layers % 2:
        raise WeightsError(f"{path.name}: num_hidden_layers={layers}: must be even (local and global layers alternate)")


def rope_base(path: Path, found: dict[str, Any]) -> float:
    """rope_theta, by itself (transformers 4) or among rope_parameters (5)."""
    rope = found.get("rope_parameters")
    if rope is None:
        return float(number(path, found, "rope_theta"))
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind != "default":
        raise WeightsError(f"{path.name}: rope_parameters: rope_type={shown(kind)}: Gemma 2 has the default one")
    return float(number(path, rope, "rope_theta"))


def write(model: Model, dtype: str) -> dict[str, Any]:
    """config.json for transformers 4.42 and later. Raises ConfigError for a model that it cannot express."""
    scalar = model.query_scale**-2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise ConfigError(
            f"model.query_scale={model.query_scale}: transformers wants query_scale ** -2 whole, it is {scalar:.6g}"
        )
    if model.width % model.heads:
        raise ConfigError(f"model.heads={model.heads}: transformers wants it to divide model.width={model.width}")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "gemma2",
        **{theirs: getattr(model, ours) for theirs, ours in (WHOLE | REAL).items()},
        "query_pre_attn_scalar": round(scalar),
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
        "hidden_act": GELU,
        "hidden_activation": GELU,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return config


def generation(model: Model) -> dict[str, Any]:
    """generation_config.json: a turn's end ends it too, where the vocabulary is Gemma's."""
    ends: int | list[int] = [1, 107] if model.vocab >= 256000 else 1
    return {"bos_token_id": 2, "eos_token_id": ends, "pad_token_id": 0}
