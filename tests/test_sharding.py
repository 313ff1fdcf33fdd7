"""Where parameters live, and that where they live changes no loss."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from gemma import data
from gemma.config import Mesh, Model, Program
from gemma.model import Gemma
from gemma.sharding import RULES, make_mesh, spec
from gemma.step import functions, is_variable
from gemma.tokenizer import BOS, PAD

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
    def steps(mesh: Mesh, accumulation: int = 1, remat: str = "none") -> np.ndarray:
        train = replace(program.train, accumulation=accumulation, remat=remat)
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
