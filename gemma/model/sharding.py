"""Where every array lives: one table from logical axes to mesh axes, and the mesh itself."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gemma.config import Mesh

# A parameter or activation names its logical axes; this table alone says over which mesh axes they are cut.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("replica", "fsdp"),
    "time": None,
    "pairs": None,  # the scanned axis
    "which": None,  # key or value, gate or up, one of four norms
    "vocab": "tensor",
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "hidden": "tensor",
    "norm": None,  # a few kilobytes: cutting them would cost a collective each
}


EMBEDDING_AXES = ("vocab", "width")
BATCH_AXES = ("replica", "fsdp")  # over these the step is written by hand; over `tensor` XLA partitions it


def make_mesh(mesh: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh (replica, fsdp, tensor). Replicas take whole slices, so only `replica` crosses the DCN.

    Args: a filled mesh whose product is the number of devices; those of all processes if not given.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id))
    if math.prod(mesh.shape) != len(devices):
        raise ValueError(f"mesh {mesh.shape} wants {math.prod(mesh.shape)} devices, there are {len(devices)}")
    if devices[0].platform == "tpu":  # neighbours on the torus become neighbours in the mesh
        from jax.experimental import mesh_utils

        slices = len({getattr(d, "slice_index", 0) for d in devices})
        if slices > 1:
            inside = (mesh.replica // slices, mesh.fsdp, mesh.tensor)
            grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(mesh.shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(mesh.shape)
    return jax.sharding.Mesh(grid, ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions carry these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def sharding(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def manual(axes: tuple[str, ...]) -> PartitionSpec:
    """`spec` without `tensor`: what a function that is manual over BATCH_AXES sees of an array's partition."""
    return PartitionSpec(*(None if RULES[axis] == "tensor" else RULES[axis] for axis in axes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(x: jax.Array, axes: tuple[str, ...], dtype: str, reduce_dtype: str) -> jax.Array:
    """A weight in `dtype`, whole along `fsdp`. Its gradient is summed over `fsdp` in `reduce_dtype` and each device
    gets its part, in x's dtype.

    Cast before it travels: in bfloat16 half the bytes.
    """
    return gather(x.astype(dtype), axes)


def gather_weight_forward(
    x: jax.Array, axes: tuple[str, ...], dtype: str, reduce_dtype: str
) -> tuple[jax.Array, jax.Array]:
    return gather_weight(x, axes, dtype, reduce_dtype), jnp.zeros((0,), x.dtype)


def gather_weight_backward(
    axes: tuple[str, ...], dtype: str, reduce_dtype: str, like: jax.Array, dwhole: jax.Array
) -> tuple[jax.Array]:
    return (scatter(dwhole.astype(reduce_dtype), axes).astype(like.dtype),)


gather_weight.defvjp(gather_weight_forward, gather_weight_backward)


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A weight made whole along `fsdp`; it stays cut along `tensor`.

    Outside a function that is manual over `fsdp` (one device, a notebook) the weight is whole already.
    """
    if (dim := fsdp_dim(axes)) is None:
        return x

    def whole(x: jax.Array) -> jax.Array:
        for groups in stages_here():
            x = jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True, axis_index_groups=groups)
        return x

    return cut_along_tensor(whole, axes)(x)


def scatter(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The reverse of `gather`: of what every device holds whole, each gets its part of the sum over `fsdp`."""
    if (dim := fsdp_dim(axes)) is None:
        return x

    def part(x: jax.Array) -> jax.Array:
        for groups in reversed(stages_here()):
            x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=dim, tiled=True, axis_index_groups=groups)
        return x

    return cut_along_tensor(part, axes)(x)


def fsdp_dim(axes: tuple[str, ...]) -> int | None:
    """The dimension that is cut along `fsdp` where the program is manual over it, else None."""
    dims = [dim for dim, axis in enumerate(axes) if RULES[axis] == "fsdp"]
    manual_here = "fsdp" in jax.sharding.get_abstract_mesh().manual_axes
    return dims[0] if dims and manual_here else None


def cut_along_tensor(function: Callable[[jax.Array], jax.Array], axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """`function` by hand over `tensor` too, on each device's part: left to XLA, which partitions no collective of a
    hand-written program, it would get and give arrays that are whole along `tensor`.
    """
    if jax.sharding.get_abstract_mesh().shape["tensor"] == 1:
        return function
    cut = PartitionSpec(*("tensor" if RULES[axis] == "tensor" else None for axis in axes))
    return jax.shard_map(function, in_specs=cut, out_specs=cut, axis_names={"tensor"}, check_vma=False)


def by_heads(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """attend(q_BTNH, k_BTKH, v_BTKH, segment_BT) -> out_BTNH by a Pallas kernel, which XLA cannot partition.

    The step is manual over the batch's axes already; here the heads become manual too, over `tensor`, whatever its
    size. Outside of the step (one device) there is no mesh to be manual over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.axis_names or "tensor" in mesh.manual_axes or not mesh.manual_axes:
        return attend
    heads = PartitionSpec(None, None, "tensor", None)
    specs = (heads, heads, heads, PartitionSpec())
    return jax.shard_map(attend, in_specs=specs, out_specs=heads, axis_names={"tensor"}, check_vma=False)


def stages_here() -> list[list[list[int]] | None]:
    shape = jax.sharding.get_abstract_mesh().shape
    staged = shape["tensor"] == 1 or shape["fsdp"] >= SMALLEST_STAGED
    return stages(shape["fsdp"]) if staged else [None]


# Over all chips of a torus the TPU compiler gathers by an all-reduce over zeros: twice the bytes, and a copy. Over any
# part of them it does not. From 4x4x4 up a slice is a torus.
SMALLEST_TORUS = 64
LARGEST_GROUP = 64
# With `tensor` beside it `fsdp` is but a part of the torus. From here on stages pay all the same: a chip's part of a
# gradient is narrower than a tile, and the compiler sums such a one whole before it is cut. At 64 they cost more.
SMALLEST_STAGED = 256


def stages(size: int) -> list[list[list[int]] | None]:
    """The groups of `size` devices that gather in turn; None is all of them at once.

    Neighbours first, then each with its like of the other groups, in large groups that move nearly all bytes: so the
    parts end up in order.
    """
    last = max(n for n in range(1, LARGEST_GROUP + 1) if size % n == 0 and 4 * n <= max(size, 4))
    if size < SMALLEST_TORUS or last == 1:
        return [None]
    found: list[list[list[int]] | None] = []
    stride = 1
    for n in (size // last, last):
        starts = [s for s in range(size) if s // stride % n == 0]
        found.append([[start + stride * k for k in range(n)] for start in starts])
        stride *= n
    return found
