"""Runs tokamax's Hopper kernels on a CPU: Pallas interprets them, and what its interpreter lacks in 0.10.2 is put here.

All of it moves data or orders threads: a register layout is dropped, a transposed or a register operand of a matrix
product is read as such, an accumulator in registers is added after, memory that two uses share is given to each, the
named barriers that make two warp groups take turns are left out, and a kernel may end before it saw that its last
blocks were consumed. Masks, cap, softmax, loops over blocks, copies into shared memory and their barriers are the
kernels' own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernels be traced where there is no GPU."""
    from tokamax._src import gpu_utils

    from gemma.model import attention_gpu

    for name in ("is_sm90", "has_mosaic_gpu_support"):
        monkeypatch.setattr(gpu_utils, name, lambda device=None: True)
    monkeypatch.setattr(attention_gpu, "available", lambda: True)


def interpret(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    """run(), its Mosaic kernels interpreted."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params, shared_memory
    from tokamax._src.ops.attention import pallas_mosaic_gpu_common

    for name in ("bar_arrive", "bar_sync"):
        monkeypatch.setattr(pallas_mosaic_gpu_common, name, lambda *_, **__: None)
    monkeypatch.setattr(plgpu, "load", lambda ref, index=(), **_: ref[index if index != () else ...])
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, *_: x)
    monkeypatch.setattr(plgpu, "broadcasted_iota", lambda dtype, shape, dim, **_: iota(dtype, shape, dim))
    monkeypatch.setattr(plgpu, "RefUnion", lambda *uses: uses)
    monkeypatch.setattr(plgpu.ACC, "init", staticmethod(Register))
    monkeypatch.setattr(pl, "run_state", add_after)
    monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma)
    monkeypatch.setattr(shared_memory.Barrier, "deallocate", forget)
    with params.force_gpu_interpret_mode():
        return jax.block_until_ready(run())


iota = jax.lax.broadcasted_iota


def forget(barrier: Any) -> None:
    with barrier.cv:
        barrier.ref_count -= 1


class Register:
    """A value that is read and written as a reference is."""

    def __init__(self, value: jax.Array):
        self.value = value

    def __getitem__(self, _: Any) -> jax.Array:
        return self.value

    def __setitem__(self, _: Any, value: jax.Array) -> None:
        self.value = value


def add_after(body: Callable[..., None]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`pl.run_state` of (accumulator, sums): the products start from zero, what was there before is added to them."""

    def run(state: tuple[Register, jax.Array]) -> tuple[jax.Array, jax.Array]:
        before, sums = state[0].value, Register(state[1])

        def products(acc: Any) -> tuple[jax.Array, jax.Array]:
            body((acc, sums))
            return acc[...], sums.value

        added, after = pl.run_scoped(products, plgpu.ACC(before.shape, jnp.float32))
        return before + added, after

    return run


def wgmma(*, token: jax.Array, device_id: Any, thread_id: Any, grid_point_coords: Any, **operands: Any) -> jax.Array:
    """acc += a @ b, each a place in simulated memory, maybe transposed, or the value itself."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu

    memory = gpu._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))
    log = gpu.interpret_utils.GPULoggingInfo(
        device_id=int(device_id),
        grid_point_coords=tuple(int(x) for x in grid_point_coords),
        thread_id=int(thread_id),
        source_info=operands["source_info"],
    )

    def place(name: str) -> tuple[Any, Any, bool]:
        steps = [t for t in operands[f"{name}_transforms"] if not isinstance(t, gpu.NOOP_TRANSFORMS)]
        indices = [t for t in steps if hasattr(t, "indices")]
        key = gpu.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
        where = gpu.interpret_utils.to_range(jax.tree.map(int, indices))
        return key, where, len(steps) - len(indices) == 1

    def read(name: str) -> np.ndarray:
        value = operands[f"{name}_allocation_key_as_array"]
        if value.ndim == 2:
            return np.asarray(value, np.float32)
        key, where, transposed = place(name)
        content = np.asarray(memory.get_buffer_content(key, where, thread, logging_info=log)[0], np.float32)
        return content.T if transposed else content

    key, where, _ = place("acc")
    memory.store_buffer_content(key, where, read("acc") + read("a") @ read("b"), thread, logging_info=log)
    return token
