"""The log-probabilities of blocks of rows: a prefix's keys and values once, then rows of branches behind it.

R rows of all devices, T tokens of a row, X devices that have rows, C targets of a device, P tokens of the prefix, S
keys a row sees: P + T. N query heads, K kv heads, G = N/K, H head size, D width, V vocabulary.

A device has its own rows and never another's; weights are gathered along `fsdp` before they are used. So a row's bits
do not depend on how many devices there are. They do on `mesh.tensor`: heads are summed over it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma.batching.rows import LOGITS
from gemma.engine.forward import Shape, all_logits, hidden, weight_places
from gemma.model.attention import MASKED, soft_cap
from gemma.model.transformer import float32_means_float32

Tree = Any
ROWS = ("replica", "fsdp")  # mesh axes over which rows are cut


Of = Callable[[Tree], Tree]


class Block(NamedTuple):
    """What a device computes at a time, over all devices. A place without a token has position -1."""

    tokens_RT: Any
    position_RT: Any
    branch_RT: Any
    place_XC: Any  # in the device's own rows, one behind another
    target_XC: Any


Prefix = tuple[tuple[jax.Array, jax.Array], ...]  # of each layer: k_PKH, v_PKH, everywhere


def block_places(mesh: jax.sharding.Mesh) -> Block:
    return Block(*[NamedSharding(mesh, P(ROWS))] * len(Block._fields))


def prefix_places(shape: Shape) -> Prefix:
    heads: Any = NamedSharding(shape.mesh, P(None, "tensor"))
    return ((heads, heads),) * shape.model.layers


def empty_prefix(shape: Shape, length: int) -> Any:
    """Shapes and places, as for compiling."""
    model = shape.model
    one = jax.ShapeDtypeStruct((length, model.kv_heads, model.head_size), jnp.dtype(shape.dtype))
    return jax.tree.map(lambda place: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place), prefix_places(shape))


def gathered(shape: Shape, weights: Tree) -> Tree:
    """Whole along `fsdp`. Left to itself the compiler may sum over it instead: other bits for another mesh."""
    if shape.mesh.shape["fsdp"] == 1:
        return weights

    def whole(weight: Any, place: NamedSharding) -> Any:
        spec = P(*(None if axis == "fsdp" else axis for axis in place.spec))
        return jax.lax.with_sharding_constraint(weight, NamedSharding(shape.mesh, spec))

    return jax.tree.map(whole, weights, weight_places(shape))


def attention(
    shape: Shape,
    position_RT: jax.Array,
    branch_RT: jax.Array,
    prefix: Prefix,
    length: jax.Array,
    layer: int,
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
) -> jax.Array:
    """Every pair of query and key is computed, then masked. A token sees its prefix, what is common, and its branch."""
    model, window = shape.model, shape.model.window if layer % 2 == 0 else None
    R, T, N, H = q_RTNH.shape
    K = k_RTKH.shape[2]
    q_RTKGH = q_RTNH.reshape(R, T, K, N // K, H)
    logits = [jnp.einsum("RTKGH,RSKH->RKGTS", q_RTKGH, k_RTKH, preferred_element_type=jnp.float32)]
    distance_RTT = position_RT[:, :, None] - position_RT[:, None, :]
    same_RTT = (branch_RT[:, None, :] == 0) | (branch_RT[:, :, None] == branch_RT[:, None, :])
    seen = [(distance_RTT >= 0) & same_RTT & (position_RT[:, None, :] >= 0)]
    distance = [distance_RTT]
    if prefix:
        k_PKH, v_PKH = prefix[layer]
        at_P = jnp.arange(len(k_PKH))
        logits.insert(0, jnp.einsum("RTKGH,PKH->RKGTP", q_RTKGH, k_PKH, preferred_element_type=jnp.float32))
        distance.insert(0, position_RT[:, :, None] - at_P)
        seen.insert(0, jnp.broadcast_to(at_P < length, (R, T, len(at_P))))
    logits_RKGTS, distance_RTS = jnp.concatenate(logits, axis=-1), jnp.concatenate(distance, axis=-1)
    mask_RTS = jnp.concatenate(seen, axis=-1)
    if window is not None:
        mask_RTS &= distance_RTS < window
    logits_RKGTS = jnp.where(mask_RTS[:, None, None], soft_cap(logits_RKGTS, model.attention_cap), MASKED)
    weights_RKGTS = jax.nn.softmax(logits_RKGTS, axis=-1).astype(q_RTNH.dtype)
    split = weights_RKGTS.shape[-1] - T
    out_RTKGH = jnp.einsum("RKGTS,RSKH->RTKGH", weights_RKGTS[..., split:], v_RTKH)
    if prefix:
        out_RTKGH += jnp.einsum("RKGTP,PKH->RTKGH", weights_RKGTS[..., :split], v_PKH)
    return out_RTKGH.reshape(R, T, N, H)


def read_prefix(shape: Shape, of: Of, weights: Tree, tokens_P: jax.Array, length: jax.Array) -> Prefix:
    """Keys and values of a prefix; what lies behind its length is never seen."""
    found: list[tuple[jax.Array, jax.Array]] = []
    at_1P = jnp.arange(len(tokens_P))[None]
    position_1P = jnp.where(at_1P < length, at_1P, -1)
    attend = partial(attention, shape, position_1P, jnp.zeros_like(position_1P), (), length)

    def kept(layer: int, q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array) -> jax.Array:
        found.append((k_RTKH[0], v_RTKH[0]))
        return attend(layer, q_RTNH, k_RTKH, v_RTKH)

    with float32_means_float32(shape.dtype):
        hidden(shape, gathered(shape, of(weights)), tokens_P[None], position_1P, kept)
    return tuple(found)


def score(
    shape: Shape, of: Of, weights: Tree, block: Block, prefix: Prefix, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each target's log-probability in nats, float32 [X, C], and whether no token is more likely."""
    weights = gathered(shape, of(weights))
    attend = partial(attention, shape, block.position_RT, block.branch_RT, prefix, length)
    with float32_means_float32(shape.dtype):
        x_RTD = hidden(shape, weights, block.tokens_RT, block.position_RT, attend)
        X, C = block.place_XC.shape
        x_XCD = jnp.take_along_axis(x_RTD.reshape(X, -1, x_RTD.shape[-1]), block.place_XC[..., None], axis=1)
        size = min(LOGITS, C)

        def part(_: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            x_XcD, target_Xc = xs
            logits_XcV = all_logits(shape, weights, x_XcD)
            chosen_Xc = jnp.take_along_axis(logits_XcV, target_Xc[..., None], axis=-1)[..., 0]
            greedy_Xc = chosen_Xc >= logits_XcV.max(axis=-1)  # argmax takes a CPU as long as the rest of it
            return None, (chosen_Xc - jax.nn.logsumexp(logits_XcV, axis=-1), greedy_Xc)

        cut = x_XCD.reshape(X, C // size, size, -1), block.target_XC.reshape(X, C // size, size)
        _, found = jax.lax.scan(part, None, (cut[0].swapaxes(0, 1), cut[1].swapaxes(0, 1)))
    logprob_XC, greedy_XC = (x.swapaxes(0, 1).reshape(X, C) for x in found)
    return logprob_XC, greedy_XC


def programs(
    shape: Shape, weights: Tree, of: Of, sizes: Sequence[tuple[int, int, int, int]]
) -> dict[Any, tuple[Any, Any]]:
    """By name and sizes: what is to be compiled, and the shapes of what it takes. weights: as they are held; `of` makes
    of them what `gemma.engine.forward` computes with. sizes: of prefix, row, rows of a device, and its targets.
    """
    mesh = shape.mesh
    everywhere = NamedSharding(mesh, P())
    devices = mesh.shape["replica"] * mesh.shape["fsdp"]
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    found: dict[Any, tuple[Any, Any]] = {}
    for prefix, width, rows, targets in sizes:
        if prefix and ("prefix", prefix) not in found:
            tokens_P = jax.ShapeDtypeStruct((prefix,), jnp.int32, sharding=everywhere)
            jitted = jax.jit(partial(read_prefix, shape, of), out_shardings=prefix_places(shape))
            found["prefix", prefix] = jitted, (weights, tokens_P, scalar)
        wide, narrow = (rows * devices, width), (devices, targets)
        block = Block(
            *(
                jax.ShapeDtypeStruct(narrow if name.endswith("C") else wide, jnp.int32, sharding=place)
                for name, place in zip(Block._fields, block_places(mesh), strict=True)
            )
        )
        before = empty_prefix(shape, prefix) if prefix else ()
        jitted = jax.jit(partial(score, shape, of), out_shardings=everywhere)
        found["score", prefix, width, rows, targets] = jitted, (weights, block, before, scalar)
    return found
