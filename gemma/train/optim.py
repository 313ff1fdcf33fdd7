"""AdamW, its schedule, and what it must leave alone."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from gemma.config import Optim


def schedule(config: Optim, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to lr, then cosine, constant or linear until `steps`."""
    rest = max(steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        body = optax.cosine_decay_schedule(config.lr, rest, alpha=config.final_lr_ratio)
    elif config.schedule == "linear":
        body = optax.linear_schedule(config.lr, config.lr * config.final_lr_ratio, rest)
    else:
        body = optax.constant_schedule(config.lr)
    if config.warmup_steps == 0:
        return body
    # Starts one step in: at exactly 0 the first batch would teach nothing.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, body], [config.warmup_steps])


def decayed(params: optax.Params) -> optax.Params:
    """True where weight decay applies: everywhere but on norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def optimizer(config: Optim, steps: int) -> optax.GradientTransformation:
    """AdamW without clipping, which `gemma.train.step` does with the norm it reports anyway."""
    return optax.adamw(
        schedule(config, steps),
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
