"""Gemma 2 in NumPy float64: one sequence, one head, one query at a time, as the report (arXiv:2408.00118) tells it.

Shares no code with `gemma`, only the config's numbers and the layout of its parameters (`layers`).

T time, D width, N query heads, H head size, V vocabulary.
"""

from typing import Any

import numpy as np

from gemma.config import Model

Array = np.ndarray
Layer = dict[str, Array]


def layers(params: dict[str, Any]) -> list[Layer]:
    """The stacked blocks taken apart, in the order in which they run: local, global, local, ..."""
    out = []
    for pair in range(len(params["pairs"]["local_block"]["q_PDNH"])):
        for name in ("local_block", "global_block"):
            block = {key: np.asarray(value, np.float64)[pair] for key, value in params["pairs"][name].items()}
            before, after, before_mlp, after_mlp = block["norms_P4D"]
            key, value = block["kv_P2DKH"]
            gate, up = block["gating_P2DF"]
            out.append(
                {
                    "pre_attention_layernorm": before,
                    "post_attention_layernorm": after,
                    "pre_feedforward_layernorm": before_mlp,
                    "post_feedforward_layernorm": after_mlp,
                    "q_proj": block["q_PDNH"],
                    "k_proj": key,
                    "v_proj": value,
                    "o_proj": block["o_PNHD"],
                    "gate_proj": gate,
                    "up_proj": up,
                    "down_proj": block["down_PFD"],
                }
            )
    return out


def forward(params: dict[str, Any], config: Model, tokens_T: Array) -> Array:
    """logits_TV of one document."""
    embedding_VD = np.asarray(params["embedding_VD"], np.float64)
    x_TD = embedding_VD[tokens_T] * np.sqrt(config.width)
    for index, layer in enumerate(layers(params)):
        window = config.window if index % 2 == 0 else len(tokens_T)
        y_TD = attention(layer, config, norm(x_TD, layer["pre_attention_layernorm"], config), window)
        x_TD = x_TD + norm(y_TD, layer["post_attention_layernorm"], config)
        y_TD = mlp(layer, norm(x_TD, layer["pre_feedforward_layernorm"], config))
        x_TD = x_TD + norm(y_TD, layer["post_feedforward_layernorm"], config)
    logits_TV = norm(x_TD, np.asarray(params["final_norm"], np.float64), config) @ embedding_VD.T
    return np.tanh(logits_TV / config.final_cap) * config.final_cap


def norm(x_TD: Array, scale_D: Array, config: Model) -> Array:
    return x_TD / np.sqrt(np.mean(x_TD**2, axis=1, keepdims=True) + config.norm_eps) * (1 + scale_D)


def attention(layer: Layer, config: Model, x_TD: Array, window: int) -> Array:
    T, group = len(x_TD), config.heads // config.kv_heads
    out_TD = np.zeros_like(x_TD)
    for head in range(config.heads):
        q_TH = rotate(x_TD @ layer["q_proj"][:, head], config.rope_base)
        k_TH = rotate(x_TD @ layer["k_proj"][:, head // group], config.rope_base)
        v_TH = x_TD @ layer["v_proj"][:, head // group]
        for t in range(T):
            seen = range(max(0, t - window + 1), t + 1)
            logits = np.array([q_TH[t] @ k_TH[s] * config.query_scale for s in seen])
            logits = config.attention_cap * np.tanh(logits / config.attention_cap)
            weights = np.exp(logits - logits.max())
            mixed_H = sum(w * v_TH[s] for w, s in zip(weights / weights.sum(), seen, strict=True))
            out_TD[t] += mixed_H @ layer["o_proj"][head]
    return out_TD


def rotate(x_TH: Array, base: float) -> Array:
    """Rotary embedding: element i and i + H/2 are one complex number, turned by position * base^(-2i/H)."""
    T, H = x_TH.shape
    angle = np.outer(np.arange(T), base ** (-2 * np.arange(H // 2) / H))
    turned = (x_TH[:, : H // 2] + 1j * x_TH[:, H // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def mlp(layer: Layer, x_TD: Array) -> Array:
    gate = x_TD @ layer["gate_proj"]
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * (x_TD @ layer["up_proj"])) @ layer["down_proj"]
