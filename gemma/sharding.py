"""Where every array lives: one table from logical axes to mesh axes, and the mesh itself."""

import math

import jax
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


BATCH_AXES = ("replica", "fsdp")  # over these the step is written by hand; over `tensor` XLA partitions it


def make_mesh(mesh: Mesh) -> jax.sharding.Mesh:
    """The device mesh (replica, fsdp, tensor). Replicas take whole slices, so only `replica` crosses the DCN.

    Args: a filled mesh whose product is the number of devices of all processes.
    """
    devices = sorted(jax.devices(), key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id))
    if math.prod(mesh.shape) != len(devices):
        raise ValueError(f"mesh {mesh.shape} wants {math.prod(mesh.shape)} devices, there are {len(devices)}")
    if devices[0].platform == "tpu":  # neighbours on the torus become neighbours in the mesh
        from jax.experimental import mesh_utils

        slices = len({getattr(d, "slice_index", 0) for d in devices})
        if slices > 1:
            inside = (mesh.replica // slices, mesh.fsdp, mesh.tensor)
            grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
        else:
            grid = mesh_utils.create_device_mesh(mesh.shape, devices)
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


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A weight made whole along `fsdp`; it stays cut along `tensor`. Its gradient is reduce-scattered back.

    Outside a function that is manual over `fsdp` (one device, a notebook) the weight is whole already.
    """
    if "fsdp" not in jax.sharding.get_abstract_mesh().manual_axes:
        return x
    for dim, axis in enumerate(axes):
        if RULES[axis] == "fsdp":
            x = jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)
    return x
