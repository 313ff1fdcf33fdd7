"""What bfloat16 costs where gradients are summed over `fsdp`: python -m tests.bench.reduce_error [TRAINED_STEPS]

Each of N devices has the bfloat16 gradient of one row; they are summed one after the other, as around a ring, in
bfloat16 and in float64. Printed is the error of the whole gradient and of its worst
array, as |error| / |sum|.
"""

import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma.model.transformer import Gemma
from gemma.text.tokenizer import BYTE_OFFSET
from gemma.train.step import functions, loss_sum
from tests.bench.steps import program
from tests.test_config import config_of

DEVICES = (8, 64, 512)
ROWS, U = 512, 129
MODEL = config_of().model


def main(trained_steps: int = 50) -> None:
    made = program(MODEL, batch=8, sequence=U - 1, dtype="bfloat16", remat="none", loss_chunk=64)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1),
        ("replica", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    compiled = functions(made, mesh)
    rows = text_rows()
    state = compiled.init()
    for step in range(trained_steps):
        tokens_BU = rows[np.arange(8) + 8 * step % ROWS]
        state, _ = compiled.train(state, jax.device_put(tokens_BU, compiled.batch.sharding))
    graph, _ = nnx.split(Gemma(MODEL, dtype="bfloat16", remat="none", rngs=nnx.Rngs(0)))
    loss_of = partial(loss_sum, made, graph)

    @jax.jit
    def gradient(params, tokens_BU):  # type: ignore[no-untyped-def]
        grads = jax.grad(lambda p: loss_of(p, tokens_BU)[0])(params)
        return jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)

    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]]
    exact = [np.zeros(leaf.shape, np.float64) for leaf in jax.tree.leaves(state.params)]
    rounded = [jnp.zeros(leaf.shape, jnp.bfloat16) for leaf in jax.tree.leaves(state.params)]
    add = jax.jit(lambda sums, grads: [a + b for a, b in zip(sums, grads, strict=True)])
    for row in range(ROWS):
        grads = jax.tree.leaves(gradient(state.params, rows[row : row + 1]))
        rounded = add(rounded, grads)
        for total, grad in zip(exact, grads, strict=True):
            total += np.asarray(grad, np.float64)
        if row + 1 in DEVICES:
            error = [np.linalg.norm(np.asarray(r, np.float64) - e) for r, e in zip(rounded, exact, strict=True)]
            size = [float(np.linalg.norm(e)) for e in exact]
            each = [e / s for e, s in zip(error, size, strict=True)]
            worst = int(np.argmax(each))
            whole = np.linalg.norm(error) / np.linalg.norm(size)
            print(f"fsdp {row + 1:4}: {whole:.2%} of the gradient; worst {names[worst]} {each[worst]:.2%}", flush=True)


def text_rows() -> np.ndarray:
    """The source of the standard library in bytes, as the byte tokenizer numbers them."""
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[: ROWS * U]
    return np.frombuffer(text, np.uint8).astype(np.int32).reshape(ROWS, U) + BYTE_OFFSET


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
