"""Checksums of a train state, computed on its devices: a restored state is compared with the saved one.

A leaf has two sums, uint32 and wrapping, over all its elements. What an element adds is its bits mixed with its index
in the whole array, one to one for each index: a single changed element always changes the sum, any other change but
for one in 2^64. Integers add up to the same in any order, so a leaf's sums do not depend on how it is cut. An element
may be of 1, 2, 4 or 8 bytes.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gemma.checkpoint import words

OTHER = 0x9E3779B9  # added before mixing again: makes the second sum differ from the first
Tree = Any  # a TrainState, or a part of one by its names
Cut = tuple[tuple[str, ...], ...]  # of each dimension: the mesh axes that cut it


def names(state: Tree) -> list[str]:
    """Of the leaves, as `params.embedding`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]


def summing(state: Tree, mesh: jax.sharding.Mesh) -> Any:
    """The program: state to uint32 [leaves, 2], on every device. Devices send each other nothing but sums, and those
    of one replica none to another's.

    state: of jax.ShapeDtypeStruct with shardings. Raises ValueError for leaves whose bits cannot be read.
    """
    leaves = jax.tree.leaves(state)
    for leaf in leaves:
        words.carrier(leaf.dtype)
    cuts = [cut_of(leaf) for leaf in leaves]
    over = [tuple(itertools.chain(*cut)) for cut in cuts]  # where a leaf's parts lie

    def summed(state: Tree) -> jax.Array:
        parts = [
            part_sums(part, leaf.shape, cut)
            for part, leaf, cut in zip(jax.tree.leaves(state), leaves, cuts, strict=True)
        ]
        for axes in sorted(set(over) - {()}):
            at = [i for i, mine in enumerate(over) if mine == axes]
            whole = jax.lax.psum(jnp.stack([parts[i] for i in at]), axes)
            for row, i in enumerate(at):
                parts[i] = whole[row]
        return jnp.stack(parts)

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    return jax.jit(
        jax.shard_map(summed, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False),
        out_shardings=jax.sharding.NamedSharding(mesh, PartitionSpec()),
    )


def cut_of(leaf: jax.ShapeDtypeStruct) -> Cut:
    spec = (*leaf.sharding.spec, *[None] * len(leaf.shape))[: len(leaf.shape)]
    return tuple(() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec)


def part_sums(part: jax.Array, shape: tuple[int, ...], cut: Cut) -> jax.Array:
    """Both sums of this device's part of a leaf of a shape. Elements are counted modulo 2^32."""
    index, stride = jnp.zeros(part.shape, jnp.uint32), 1
    for dim in reversed(range(part.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, part.shape, dim)
        if cut[dim]:
            along += jax.lax.axis_index(cut[dim]).astype(jnp.uint32) * np.uint32(part.shape[dim])
        index += along * np.uint32(stride % 2**32)
        stride *= shape[dim]
    total = jnp.zeros(2, jnp.uint32)
    for bits in words.bits_of(part):  # of 8 bytes two halves
        first = mixed(bits ^ mixed(index))
        second = mixed(first + np.uint32(OTHER))
        total += jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])
        index ^= np.uint32(OTHER)
    return total


def mixed(x: jax.Array) -> jax.Array:
    """Each word to another, one to one, every bit upon every bit (the last steps of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def as_hex(state: Tree, summed: jax.Array) -> dict[str, str]:
    """Both sums of each leaf in hexadecimal, by its name."""
    return {name: f"{one:08x}{two:08x}" for name, (one, two) in zip(names(state), np.asarray(summed), strict=True)}
