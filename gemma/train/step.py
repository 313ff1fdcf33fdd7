"""The train step: state, its places, and one update.

B batch, T time, A accumulation steps; b and a are a device's share of the batch and of one microbatch.
A batch is tokens_BU, int32, U = T + 1: inputs and targets overlap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from gemma.config import Program
from gemma.model.sharding import BATCH_AXES, manual, sharding
from gemma.model.transformer import Gemma, float32_means_float32
from gemma.text.tokenizer import BOS, PAD
from gemma.train import guard, optim
from gemma.train.loss import cross_entropy_sum

Tree = Any  # a nested dict of arrays, or of what stands for them


class TrainState(NamedTuple):
    """A run's whole state besides its config. float32 except `step`."""

    step: jax.Array  # int32: steps done
    params: Tree
    opt_state: Tree
    guard: jax.Array  # of gemma.train.guard: what tells a spike


@dataclass(frozen=True)
class Functions:
    """The jitted programs of a run and what they take, ready to be lowered without any array."""

    init: Any  # () -> TrainState
    train: Any  # (TrainState, tokens_BU) -> (TrainState, {name: scalar}); the state is donated
    eval: Any  # (params, tokens_BU) -> (loss sum, target count)
    state: TrainState  # of jax.ShapeDtypeStruct with shardings
    batch: jax.ShapeDtypeStruct


def functions(program: Program, mesh: jax.sharding.Mesh) -> Functions:
    """Builds the programs for one mesh. Nothing is compiled and no memory is taken."""
    train = program.train
    tx = optim.optimizer(program.optim)
    platform = mesh.devices.flat[0].platform  # of the mesh, not of this process: the plan compiles for TPUs on a CPU
    create = partial(
        Gemma,
        program.model,
        dtype=train.dtype,
        reduce_dtype=train.gradients_in,
        remat=train.remat,
        platform=platform,
    )
    abstract = nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(abstract)
    axes = nnx.to_pure_dict(jax.tree.map(lambda v: v.axes, variables, is_leaf=is_variable))
    places = jax.tree.map(partial(sharding, mesh), axes, is_leaf=is_axes)

    def init() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(create(rngs=nnx.Rngs(train.seed))))
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), guard.fresh())

    shapes = jax.eval_shape(init)
    replicated = sharding(mesh, ())
    opt_places = optax.tree.map_params(
        tx, lambda _, place: place, shapes.opt_state, places, transform_non_params=lambda _: replicated
    )
    state_places: Any = TrainState(*[replicated, places, opt_places, replicated])
    state = jax.tree.map(lambda a, p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=p), shapes, state_places)
    batch_place = sharding(mesh, ("batch", "time"))
    batch = jax.ShapeDtypeStruct((train.batch, program.data.sequence + 1), jnp.int32, sharding=batch_place)
    loss_of = partial(loss_sum, program, graph)
    param_specs = jax.tree.map(manual, axes, is_leaf=is_axes)
    by_hand = partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(param_specs, manual(("batch", "time"))),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )
    whole = PartitionSpec()
    grads_of = by_hand(partial(reduced_grads, program, loss_of, axes), out_specs=(whole, whole, param_specs))
    return Functions(
        init=jax.jit(init, out_shardings=state_places),
        train=jax.jit(
            partial(update, program, grads_of, tx, places),
            in_shardings=(state_places, batch_place),
            out_shardings=(state_places, replicated),
            donate_argnums=0,
        ),
        eval=jax.jit(
            by_hand(partial(evaluate, program, loss_of), out_specs=(whole, whole)),
            in_shardings=(places, batch_place),
            out_shardings=replicated,
        ),
        state=state,
        batch=batch,
    )


def is_axes(x: object) -> bool:
    return isinstance(x, tuple) and all(isinstance(axis, str) for axis in x)


def is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)


def loss_sum(program: Program, graph: Any, params: Tree, tokens_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed loss in nats and the number of targets. No target lies in another document than its input."""
    model = nnx.merge(graph, params)
    input_BT, target_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
    segment_BT = jnp.cumsum(input_BT == BOS, axis=1)
    weight_BT = ((target_BT != BOS) & (target_BT != PAD)).astype(jnp.float32)
    x_BTD, embedding_VD = model.hidden(input_BT, segment_BT)
    total = cross_entropy_sum(
        x_BTD,
        embedding_VD,
        target_BT,
        weight_BT,
        cap=program.model.final_cap,
        chunk=program.train.loss_chunk,
        reduce_dtype=program.train.gradients_in,
    )
    return total, jnp.sum(weight_BT)


def reduced_grads(
    program: Program, loss_of: Any, axes: Tree, params: Tree, tokens_bU: jax.Array
) -> tuple[jax.Array, jax.Array, Tree]:
    """Loss sum, target count and gradient sum of the global batch, from this device's rows. Manual over BATCH_AXES.

    The gradient of a gathered weight arrives reduce-scattered over `fsdp`; all that is small is summed in one
    all-reduce.
    """
    grad_of = jax.value_and_grad(loss_of, has_aux=True)

    def of(tokens_aU: jax.Array) -> tuple[jax.Array, jax.Array, Tree]:
        (total, count), grads = grad_of(params, tokens_aU)
        return total, count, grads

    with float32_means_float32(program.train.dtype):
        total, count, grads = summed_over_microbatches(of, program.train.accumulation, tokens_bU)
    leaves, tree = jax.tree.flatten(grads)
    cut = ["fsdp" in manual(a) for a in jax.tree.leaves(axes, is_leaf=is_axes)]
    small = [total, count] + [g for g, c in zip(leaves, cut, strict=True) if not c]
    flat, unravel = ravel_pytree(small)
    total, count, *whole = unravel(jax.lax.psum(flat, BATCH_AXES))
    rest = iter(whole)
    replicated = program.mesh.replica > 1
    leaves = [
        next(rest) if not c else jax.lax.psum(g, "replica") if replicated else g
        for g, c in zip(leaves, cut, strict=True)
    ]
    return total, count, jax.tree.unflatten(tree, leaves)


def evaluate(program: Program, loss_of: Any, params: Tree, tokens_bU: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss sum and target count of the global batch, from this device's rows, in the microbatches of a train step:
    what has room to train has room to be evaluated. Manual over BATCH_AXES.
    """
    with float32_means_float32(program.train.dtype):
        sums = summed_over_microbatches(partial(loss_of, params), program.train.accumulation, tokens_bU)
    total, count = jax.lax.psum(sums, BATCH_AXES)
    return total, count


def summed_over_microbatches(of: Callable[[jax.Array], Any], A: int, tokens_bU: jax.Array) -> Any:
    """The sum of what `of` gives for each of A microbatches, one after the other, in the dtypes it gives: float32."""
    if A == 1:
        return of(tokens_bU)
    tokens_AaU = tokens_bU.reshape(A, -1, tokens_bU.shape[1])

    def body(carry: Any, tokens_aU: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, of(tokens_aU)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, tokens_AaU[0]))
    return jax.lax.scan(body, zeros, tokens_AaU)[0]


def update(
    program: Program,
    grads_of: Any,
    tx: optax.GradientTransformation,
    places: Tree,
    state: TrainState,
    tokens_BU: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: the mean loss over all targets of the global batch, its gradient, clipping, AdamW.

    A bad update (`guard`) is not applied: the state stays, to the bit, but for `step`. The metrics are those of
    the parameters the step began with; `ok` is 1.0 where the update is applied, else 0.0.
    """
    total, count, grads = grads_of(state.params, tokens_BU)
    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    loss = total / count
    grad_norm, param_norm = optim.global_norms((grads, state.params), places)
    if program.optim.clip_norm is not None:
        shrink = jnp.minimum(1.0, program.optim.clip_norm / jnp.maximum(grad_norm, 1e-30))
        grads = jax.tree.map(lambda g: g * shrink, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    good = guard.is_good(program.guard, state.guard, loss, grad_norm)
    # The rate applied: the schedule counts updates made, so a skipped step does not advance it.
    rate = optim.schedule(program.optim)(optim.updates_made(state.opt_state))
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "learning_rate": rate,
        "targets": count,
        "ok": good.astype(jnp.float32),
    }
    new = (params, opt_state, guard.learned(state.guard, loss, grad_norm))
    return TrainState(state.step + 1, *guard.kept(good, new, tuple(state[1:]))), metrics
