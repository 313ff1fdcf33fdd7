"""AdamW, its schedule, and what it must leave alone."""

import itertools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from gemma.config import Optim
from gemma.schedule import Piece, pieces


def schedule(config: Optim) -> optax.Schedule:
    """Learning rate by updates made, as `gemma.schedule` describes it."""
    parts = pieces(config)
    ends = list(itertools.accumulate(int(piece.length) for piece in parts[:-1]))
    return optax.join_schedules([function(piece) for piece in parts], ends)


def function(piece: Piece) -> optax.Schedule:
    if piece.shape == "cosine":
        return optax.cosine_decay_schedule(piece.start, piece.steps, alpha=piece.end / piece.start)
    return optax.linear_schedule(piece.start, piece.end, piece.steps)


def decayed(params: optax.Params) -> optax.Params:
    """True where weight decay applies: everywhere but on norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def optimizer(config: Optim) -> optax.GradientTransformation:
    """AdamW without clipping, which `gemma.train.step` does with the norm it reports anyway."""
    return optax.adamw(
        schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def updates_made(opt_state: optax.OptState) -> jax.Array:
    """int32: where the schedule stands. Behind the step by the updates that were not applied."""
    return optax.tree.get(opt_state, "ScaleByScheduleState").count


def global_norms(trees: tuple[optax.Params, ...], places: optax.Params) -> jax.Array:
    """The l2 norm of each of several trees cut alike, as optax.tree.norm, in one all-reduce instead of one a leaf.

    places: the NamedSharding of each leaf. Each device sums the squares it holds, of replicated leaves its share.
    """
    mesh = jax.tree.leaves(places)[0].mesh
    specs = jax.tree.map(lambda place: place.spec, places)

    def copies(place: jax.sharding.NamedSharding) -> int:
        axes = [axis for axis in jax.tree.leaves(tuple(place.spec)) if axis is not None]
        return mesh.size // math.prod(mesh.shape[axis] for axis in axes)

    def squares(tree: optax.Params) -> jax.Array:
        parts = jax.tree.map(lambda x, place: jnp.sum(jnp.square(x)) / copies(place), tree, places)
        return sum(jax.tree.leaves(parts), jnp.zeros(()))

    def local(trees: tuple[optax.Params, ...]) -> jax.Array:
        return jax.lax.psum(jnp.stack([squares(tree) for tree in trees]), mesh.axis_names)

    in_specs = (tuple(specs for _ in trees),)
    totals = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)(trees)
    return jnp.sqrt(totals)
