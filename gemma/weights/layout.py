"""How the released checkpoints store what our tree holds: one table for each layout. Plain: no JAX, no files.

D width, N query heads, K kv heads, H head size, F hidden, V vocabulary, P layer pairs. Layer 2p is pair p's local
block, layer 2p + 1 its global one. A row of a table names a tensor of a layer and says, in these letters, how its
dims are stored; the name of our leaf says how ours are, so a table holds no code. Dims in parentheses are one.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gemma.config import ConfigError, Model


class WeightsError(ConfigError):
    """Weights that cannot be used, told in one line; who names a folder of them puts its key in front."""


def finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values as they are. Raises WeightsError where one is NaN or infinite: no model has such a weight."""
    good = np.isfinite(values.astype(np.float32, copy=False))
    if not good.all():
        at = [int(i) for i in np.argwhere(~good)[0]]
        raise WeightsError(f"{name} is not finite: {values[tuple(at)]} at {at} of what was read")
    return values


BLOCKS = ("local_block", "global_block")
EMBEDDING, FINAL_NORM = "embedding_VD", "final_norm"


@dataclass(frozen=True)
class Part:
    """What one stored matrix or vector is to us."""

    stored: str  # its dims as they lie in the tensor: "(NH)D"
    leaf: str
    which: int | None = None  # index along the leaf's own second axis: key or value, gate or up, one of four norms


# A tensor's name, with {layer} where it has one, and its parts; of several parts the tensor is a stack.
Table = dict[str, tuple[Part, ...]]

# Gemma2ForCausalLM of transformers: a Linear's weight is [out, in]; the output layer is the tied embedding.
HF: Table = {
    "model.embed_tokens.weight": (Part("VD", EMBEDDING),),
    "model.layers.{layer}.input_layernorm.weight": (Part("D", "norms_P4D", 0),),
    "model.layers.{layer}.post_attention_layernorm.weight": (Part("D", "norms_P4D", 1),),
    "model.layers.{layer}.pre_feedforward_layernorm.weight": (Part("D", "norms_P4D", 2),),
    "model.layers.{layer}.post_feedforward_layernorm.weight": (Part("D", "norms_P4D", 3),),
    "model.layers.{layer}.self_attn.q_proj.weight": (Part("(NH)D", "q_PDNH"),),
    "model.layers.{layer}.self_attn.k_proj.weight": (Part("(KH)D", "kv_P2DKH", 0),),
    "model.layers.{layer}.self_attn.v_proj.weight": (Part("(KH)D", "kv_P2DKH", 1),),
    "model.layers.{layer}.self_attn.o_proj.weight": (Part("D(NH)", "o_PNHD"),),
    "model.layers.{layer}.mlp.gate_proj.weight": (Part("FD", "gating_P2DF", 0),),
    "model.layers.{layer}.mlp.up_proj.weight": (Part("FD", "gating_P2DF", 1),),
    "model.layers.{layer}.mlp.down_proj.weight": (Part("DF", "down_PFD"),),
    "model.norm.weight": (Part("D", FINAL_NORM),),
}


def released(model: Model, gating: str) -> Table:
    """The Flax checkpoints as released: github.com/google-deepmind/gemma, gemma/gm/nn/_modules.py and gm/ckpts.

    gating: "DF" as in 2B, "FD" as in 9B and 27B (`transpose_gating_einsum` there). Without groups (as many kv heads as
    query heads) query, key and value are one tensor; no released size has that.
    """
    table: Table = {
        "transformer/embedder/input_embedding": (Part("VD", EMBEDDING),),
        "transformer/layer_{layer}/pre_attention_norm/scale": (Part("D", "norms_P4D", 0),),
        "transformer/layer_{layer}/post_attention_norm/scale": (Part("D", "norms_P4D", 1),),
        "transformer/layer_{layer}/pre_ffw_norm/scale": (Part("D", "norms_P4D", 2),),
        "transformer/layer_{layer}/post_ffw_norm/scale": (Part("D", "norms_P4D", 3),),
        "transformer/layer_{layer}/attn/attn_vec_einsum/w": (Part("NHD", "o_PNHD"),),
        "transformer/layer_{layer}/mlp/gating_einsum/w": tuple(Part(gating, "gating_P2DF", i) for i in (0, 1)),
        "transformer/layer_{layer}/mlp/linear/w": (Part("FD", "down_PFD"),),
        "transformer/final_norm/scale": (Part("D", FINAL_NORM),),
    }
    query, key_value = Part("NDH", "q_PDNH"), tuple(Part("KDH", "kv_P2DKH", i) for i in (0, 1))
    if model.heads == model.kv_heads:
        return table | {"transformer/layer_{layer}/attn/qkv_einsum/w": (query, *key_value)}
    return table | {
        "transformer/layer_{layer}/attn/q_einsum/w": (query,),
        "transformer/layer_{layer}/attn/kv_einsum/w": key_value,
    }


@dataclass(frozen=True)
class Slot:
    """A part of a layer in our tree: leaf[pair, which], or a whole leaf that has no pairs."""

    leaf: str  # dotted: pairs.local_block.q_PDNH
    index: tuple[int, ...]  # (), (pair,) or (pair, which)


@dataclass(frozen=True)
class Place:
    """Where a part lies in a stored layout."""

    tensor: str
    index: int | None  # in the tensor's stack of parts
    stored: str
    slot: Slot


def places(model: Model, table: Table) -> Iterator[Place]:
    """Every stored part of a model, tensor by tensor: the embedding, the layers in order, the final norm."""
    for name in (n for n, parts in table.items() if parts[0].leaf == EMBEDDING):
        yield Place(name, None, table[name][0].stored, Slot(EMBEDDING, ()))
    for layer in range(model.layers):
        for name, parts in table.items():
            for index, part in enumerate(parts if "{layer}" in name else ()):
                slot = (layer // 2,) if part.which is None else (layer // 2, part.which)
                leaf = f"pairs.{BLOCKS[layer % 2]}.{part.leaf}"
                at = index if len(parts) > 1 else None
                yield Place(name.format(layer=layer), at, part.stored, Slot(leaf, slot))
    for name in (n for n, parts in table.items() if parts[0].leaf == FINAL_NORM):
        yield Place(name, None, table[name][0].stored, Slot(FINAL_NORM, ()))


def sizes(model: Model) -> dict[str, int]:
    """Each dim letter's size."""
    named = {"D": model.width, "N": model.heads, "K": model.kv_heads, "H": model.head_size, "F": model.hidden}
    return named | {"V": model.vocab, "P": model.layers // 2, "2": 2, "4": 4}


def own_dims(leaf: str) -> str:
    """The dims of a slot of our leaf, P and the stacked axis taken off: "DNH" of q_PDNH."""
    name = leaf.rpartition(".")[2]
    return "D" if name == FINAL_NORM else re.sub(r"^P[24]?", "", name.rpartition("_")[2])


def own_shape(model: Model, leaf: str) -> tuple[int, ...]:
    """The whole leaf's shape."""
    name = leaf.rpartition(".")[2]
    return tuple(sizes(model)[dim] for dim in ("D" if name == FINAL_NORM else name.rpartition("_")[2]))


def leaves(model: Model) -> list[str]:
    """Every leaf's dotted name."""
    return list(dict.fromkeys(place.slot.leaf for place in places(model, HF)))


def stored_shape(model: Model, stored: str) -> tuple[int, ...]:
    """ "(NH)D" is [N * H, D]."""
    groups = re.findall(r"\((\w+)\)|(\w)", stored)
    return tuple(math.prod(sizes(model)[dim] for dim in group or single) for group, single in groups)


def tensor_shapes(model: Model, table: Table) -> dict[str, tuple[int, ...]]:
    """Every tensor of a stored model with its shape, in the order of `places`."""
    shapes = {}
    for place in places(model, table):
        stack = () if place.index is None else (place.index + 1,)  # the last part's index counts them
        shapes[place.tensor] = (*stack, *stored_shape(model, place.stored))
    return shapes


def to_own(model: Model, place: Place, array: np.ndarray) -> np.ndarray:
    """A stored part as we hold it; a view. Rows of the embedding may be some of all."""
    letters = re.sub(r"\W", "", place.stored)
    own = own_dims(place.slot.leaf)
    split = array.reshape([-1 if dim == "V" else sizes(model)[dim] for dim in letters])
    return split.transpose([letters.index(dim) for dim in own])


def to_stored(model: Model, place: Place, array: np.ndarray) -> np.ndarray:
    """What `to_own` undoes, up to the last reshape: dims in stored order, not yet joined, a view."""
    own = own_dims(place.slot.leaf)
    return array.transpose([own.index(dim) for dim in re.sub(r"\W", "", place.stored)])


def match(want: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raises WeightsError naming the first tensor that is missing, extra or misshapen, and how many more there are."""
    wrong = [f"{name} is missing" for name in want if name not in found]
    wrong += [f"{name} is not a tensor of this model" for name in sorted(found) if name not in want]
    wrong += [
        f"{name} is {list(found[name])}, the model's is {list(shape)}"
        for name, shape in want.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        raise WeightsError(wrong[0] + (f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""))
