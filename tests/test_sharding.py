"""Where parameters live, and that where they live changes no loss."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from gemma.config import Mesh, Model, Program
from gemma.model.sharding import EMBEDDING_AXES, RULES, gather_weight, make_mesh, spec, stages
from gemma.model.transformer import Gemma
from gemma.plan import flops, hlo
from gemma.plan.hlo_cost import Place, cost
from gemma.text.tokenizer import BOS, PAD
from gemma.train import data
from gemma.train.step import functions, is_variable

CONF = Path(__file__).parents[1] / "conf" / "model"
AXES = ("replica", "fsdp", "tensor")
ONE_DEVICE = Mesh(replica=1, fsdp=1, tensor=1)
Run = Callable[..., np.ndarray]


def parameters_of_27b() -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of each."""
    model = Model(**yaml.safe_load((CONF / "gemma2_27b.yaml").read_text())["model"])
    state = nnx.state(nnx.eval_shape(lambda: Gemma(model, rngs=nnx.Rngs(0))))
    found = jax.tree.leaves_with_path(state, is_leaf=is_variable)
    return {jax.tree_util.keystr(path): (variable.shape, variable.axes) for path, variable in found}


def test_every_dimension_of_a_parameter_has_a_rule() -> None:
    for name, (shape, axes) in parameters_of_27b().items():
        assert len(axes) == len(shape), name
        assert set(axes) <= RULES.keys(), name


def test_every_parameter_of_27b_divides_over_64_by_8() -> None:
    ways = {None: 1, "fsdp": 64, "tensor": 8}
    for name, (shape, axes) in parameters_of_27b().items():
        for size, axis in zip(shape, spec(axes), strict=True):
            assert size % ways[axis] == 0, f"{name}: {size} over {axis}"


def test_only_norms_of_27b_are_held_whole() -> None:
    whole = {name for name, (_, axes) in parameters_of_27b().items() if not {"fsdp", "tensor"} & set(spec(axes))}
    assert whole == {name for name in parameters_of_27b() if "norm" in name}


def test_a_mesh_of_another_size_than_the_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="wants 4 devices, there are 8"):
        make_mesh(Mesh(replica=1, fsdp=4, tensor=1))


def a_batch(program: Program, step: int) -> np.ndarray:
    """Documents of uneven length, so that devices hold different numbers of targets."""
    rng = np.random.default_rng(step)
    tokens_BU = rng.integers(4, program.model.vocab, (program.train.batch, program.data.sequence + 1), np.int32)
    tokens_BU[rng.random(tokens_BU.shape) < 0.15] = BOS
    tokens_BU[0, 5:] = PAD
    return tokens_BU


@pytest.fixture(scope="module")
def run(program: Program) -> Run:
    """Metrics of 5 steps by mesh, accumulation and remat; each way runs once."""

    @cache
    def steps(mesh: Mesh, accumulation: int = 1, remat: str = "none", reduce_dtype: Any = "auto") -> np.ndarray:
        train = replace(program.train, accumulation=accumulation, remat=remat, reduce_dtype=reduce_dtype)
        ours = replace(program, mesh=mesh, train=train)
        devices = jax.devices()[: np.prod(mesh.shape)]
        grid = make_mesh(mesh) if len(devices) == 8 else jax.sharding.Mesh(np.array(devices).reshape(mesh.shape), AXES)
        with jax.set_mesh(grid):
            compiled = functions(ours, grid)
            state, rows = compiled.init(), []
            for step in range(5):
                tokens_BU = a_batch(ours, step)
                state, metrics = compiled.train(state, data.place(compiled.batch, lambda a, b, t=tokens_BU: t[a:b]))
                rows.append([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "targets")])
        return np.array(rows)

    return steps


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2)], ids=str)
def test_five_steps_are_those_of_one_device(run: Run, shape: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(run(Mesh(*shape)), run(ONE_DEVICE), rtol=1e-4)


def test_the_five_steps_learn(run: Run) -> None:
    losses = run(ONE_DEVICE)[:, 0]
    assert np.ptp(losses) > 0.01  # a hundred times what the meshes may differ by


def test_accumulation_changes_no_step(run: Run) -> None:
    np.testing.assert_allclose(run(Mesh(2, 2, 2), accumulation=2), run(ONE_DEVICE), rtol=1e-4)


@pytest.mark.parametrize("remat", ["full", "narrow", "dots"])
def test_rematerialisation_changes_no_step(run: Run, remat: str) -> None:
    np.testing.assert_allclose(run(ONE_DEVICE, remat=remat), run(ONE_DEVICE), rtol=1e-4)


@pytest.mark.parametrize("size", [8, 64, 67, 96, 128, 512, 768, 1024, 6144])
def test_gathered_in_stages_the_parts_end_up_in_order(size: int) -> None:
    held = [[device] for device in range(size)]
    for groups in stages(size):
        for group in groups or [list(range(size))]:
            together = [part for device in group for part in held[device]]
            for device in group:
                held[device] = together
    assert all(parts == list(range(size)) for parts in (held[0], held[-1], held[size // 2]))


@pytest.mark.parametrize("size", [64, 128, 512, 1024, 6144])
def test_no_stage_spans_a_whole_torus(size: int) -> None:
    assert all(groups and max(len(group) for group in groups) < size for groups in stages(size))


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_what_travels_along_fsdp_is_divided_by_tensor(program: Program, shape: tuple[int, int, int]) -> None:
    """As compiled: forward and backward each gather every weight once, its gradient is scattered once; of the embedding
    lookup and loss each do. Along `tensor` no weight travels.
    """
    model, train = replace(program.model, layers=6), replace(program.train, remat="full")
    grid = make_mesh(Mesh(*shape))
    step = functions(replace(program, model=model, mesh=Mesh(*shape), train=train), grid)
    compiled = step.train.lower(step.state, step.batch).compile()
    places = [Place(0, (device, 0, 0)) for device in range(8)]
    sent = cost(hlo.parse(compiled.as_text()), dict(grid.shape), places).sent_bytes
    embedding, other = flops.parameters(model)
    a_pass = 4 * (shape[1] - 1) / shape[1] / shape[2]  # bytes that a device sends of each number
    assert 0 < sent["fsdp"]["all-gather"] <= 2 * (embedding + other) * a_pass
    assert 0 < sent["fsdp"]["reduce-scatter"] <= (2 * embedding + other) * a_pass
    assert set(sent["tensor"]) == {"all-reduce"}


def test_an_evaluation_in_microbatches_is_one_of_the_whole_batch(program: Program) -> None:
    """And takes the memory of a microbatch."""
    found, temporary = [], []
    for accumulation in (1, 4):
        train = replace(program.train, batch=32, accumulation=accumulation, loss_chunk=16)
        ours = replace(program, mesh=Mesh(2, 2, 2), train=train)
        grid = make_mesh(ours.mesh)
        step = functions(ours, grid)
        compiled = step.eval.lower(step.state.params, step.batch).compile()
        tokens_BU = a_batch(ours, 0)
        found.append(compiled(step.init().params, data.place(step.batch, lambda a, b, t=tokens_BU: t[a:b])))
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert temporary[1] < 0.5 * temporary[0]


def relative_error(program: Program, reduce_dtype: Any) -> float:
    """Of the sum over eight devices of a weight's gradient that each has in bfloat16, against one in float64."""
    grid = make_mesh(Mesh(1, 8, 1))
    x_VD = np.random.default_rng(0).normal(1.0, 0.3, (8, 64, 16)).astype(jnp.bfloat16)

    def summed(part_1VD: jax.Array) -> jax.Array:
        _, vjp = jax.vjp(lambda w: gather_weight(w, EMBEDDING_AXES, "bfloat16", reduce_dtype), jnp.zeros((64, 2)))
        return vjp(part_1VD[0])[0]

    cut, out = jax.P(("fsdp",)), jax.P(None, "fsdp")
    run = jax.shard_map(summed, mesh=grid, in_specs=cut, out_specs=out, axis_names={"fsdp"}, check_vma=False)
    got_VD = np.asarray(jax.jit(run)(x_VD), np.float64)
    want_VD = x_VD.astype(np.float64).sum(0)
    return float(np.sqrt(np.mean(np.square(got_VD / want_VD - 1))))


def test_gradients_summed_in_float32_are_not_rounded_on_the_way(program: Program) -> None:
    """The other dtype cannot be shown here: XLA aborts on CPUs where a program that is manual over only some axes of
    the mesh reduces bfloat16. `preflight` refuses that by name.
    """
    assert relative_error(program, "float32") < 1e-6


STAGED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from gemma.model.sharding import gather, scatter, stages_here
fsdp, tensor = map(int, sys.argv[1:])
mesh = jax.make_mesh((1, fsdp, tensor), ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
axes, x_VD = ("vocab", "width"), jnp.arange(4.0 * 2 * fsdp).reshape(4, 2 * fsdp)
by_hand = lambda f, out: jax.shard_map(f, mesh=mesh, in_specs=P(None, "fsdp"), out_specs=out, axis_names={"fsdp"},
                                       check_vma=False)
whole = jax.jit(by_hand(lambda x: gather(x, axes), P()))(x_VD)
np.testing.assert_array_equal(whole, x_VD)
summed = jax.jit(by_hand(lambda x: scatter(gather(x, axes), axes), P(None, "fsdp")))(x_VD)
np.testing.assert_array_equal(summed, fsdp * x_VD)
slope = jax.jit(by_hand(jax.grad(lambda x: jnp.sum(gather(x, axes) ** 2) / fsdp), P(None, "fsdp")))(x_VD)
np.testing.assert_array_equal(slope, 2 * x_VD)
staged = jax.jit(by_hand(lambda x: jnp.full(1, len(stages_here())), P()))(x_VD)
np.testing.assert_array_equal(staged, 2)
"""


@pytest.mark.parametrize(("fsdp", "tensor"), [(64, 1), (256, 2)])
def test_many_devices_gather_and_scatter_in_stages(fsdp: int, tensor: int) -> None:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={fsdp * tensor}", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", STAGED, str(fsdp), str(tensor)]
    assert subprocess.run(line, cwd=CONF.parents[1], env=os.environ | flags, timeout=120).returncode == 0
