"""Checksums of a state: what changes them, what does not, and what the devices tell each other for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma.checkpoint import checksums
from gemma.config import Mesh
from gemma.model.sharding import make_mesh
from gemma.train.step import TrainState

MESHES = [Mesh(1, 1, 1), Mesh(1, 4, 2), Mesh(2, 2, 2), Mesh(1, 2, 4), Mesh(8, 1, 1)]
CUT = {
    "whole": PartitionSpec(),
    "rows": PartitionSpec("fsdp"),
    "both": PartitionSpec("tensor", None, "fsdp"),
    "twice": PartitionSpec(None, ("fsdp", "tensor")),
}


def state() -> TrainState:
    """Of numbers and of what is none, with leaves cut in every way."""
    draw = np.random.default_rng(0)
    params = {
        "whole": draw.normal(size=7).astype(np.float32),
        "rows": draw.normal(size=(16, 3)).astype(np.float32),
        "both": draw.normal(size=(8, 2, 16)).astype(np.float32),
        "twice": np.full((2, 24), np.nan, np.float32),
    }
    return TrainState(np.int32(5), params, {"mu": dict(params)}, np.zeros(4, np.float32))  # type: ignore[arg-type]


def placed(values: TrainState, mesh: Mesh) -> tuple[Any, TrainState]:
    """The program for a mesh, and the state on it."""
    devices = make_mesh(mesh, jax.devices()[: mesh.replica * mesh.fsdp * mesh.tensor])
    specs = TrainState(PartitionSpec(), CUT, {"mu": CUT}, PartitionSpec())  # type: ignore[arg-type]
    put = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(devices, spec)), values, specs)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), put)
    return checksums.summing(abstract, devices), put


def told(values: TrainState, mesh: Mesh = MESHES[0]) -> dict[str, str]:
    summing, put = placed(values, mesh)
    return checksums.as_hex(put, summing(put))


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_sums_are_the_same_however_the_state_is_cut(mesh: Mesh) -> None:
    assert told(state(), mesh) == told(state())


def test_sums_have_the_names_of_the_leaves() -> None:
    params = ["both", "rows", "twice", "whole"]
    assert list(told(state())) == [
        "step",
        *(f"params.{name}" for name in params),
        *(f"opt_state.mu.{name}" for name in params),
        "guard",
    ]


def part_sums(words: np.ndarray) -> np.ndarray:
    """Of one leaf on one device."""
    return np.asarray(checksums.part_sums(jnp.asarray(words), words.shape, ((),) * words.ndim))


def test_any_bit_of_any_element_changes_both_sums() -> None:
    words = np.random.default_rng(1).integers(0, 2**32, (4, 5), np.uint32)
    flipped = words.reshape(-1) ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))[:, None, None] * np.eye(
        words.size, dtype=np.uint32
    )
    found = jax.vmap(lambda x: checksums.part_sums(x, words.shape, ((), ())))(flipped.reshape(-1, 4, 5))
    assert (np.asarray(found) != part_sums(words)).all()


@pytest.mark.parametrize("change", ["signs of two", "two exchanged", "a row zeroed", "rows rolled"])
def test_changes_that_plain_weighted_sums_would_miss_are_seen(change: str) -> None:
    x = np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)
    y = x.copy()
    if change == "signs of two":
        y[2, 3:5] *= -1
    elif change == "two exchanged":
        y[1, 1], y[5, 9] = x[5, 9], x[1, 1]
    elif change == "a row zeroed":
        y[3] = 0
    else:
        y = np.roll(x, 1, 0)
    assert (part_sums(x.view(np.uint32)) != part_sums(y.view(np.uint32))).all()


def test_no_array_travels_for_its_sums_and_nothing_between_replicas() -> None:
    summing, put = placed(state(), Mesh(2, 2, 2))
    text = summing.lower(put).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    reduces = [line for line in text.splitlines() if " all-reduce(" in line]
    assert reduces
    for line in reduces:
        assert "replica_groups=[1,8]" not in line
        assert "{0,1,2,3,4,5,6,7}" not in line
        assert line.split("=")[1].split("[")[0].strip() == "u32"


TYPES = [jnp.bfloat16, np.float16, np.int8, np.uint8, np.bool_, jnp.float8_e4m3fn, jnp.int4, np.int32]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_any_bit_of_an_element_of_any_type_changes_both_sums_however_it_is_cut(dtype: Any) -> None:
    bits = 1 if dtype is np.bool_ else 4 if dtype is jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    summing, put = placed(mixed_types(dtype), MESHES[0])
    whole = checksums.as_hex(put, summing(put))["params.rows"]
    assert told(mixed_types(dtype), Mesh(2, 2, 2))["params.rows"] == whole
    seen = {whole}
    for bit in range(bits):
        _, put = placed(mixed_types(dtype, flip=bit), MESHES[0])
        changed = checksums.as_hex(put, summing(put))["params.rows"]
        assert changed[:8] not in {one[:8] for one in seen}
        assert changed[8:] not in {one[8:] for one in seen}
        seen.add(changed)


def mixed_types(dtype: Any, flip: int | None = None) -> TrainState:
    """`state` with a leaf of another type, maybe with one bit of its second element flipped."""
    values = state()
    raw = np.random.default_rng(3).integers(0, 256, (16, 3, jnp.dtype(dtype).itemsize), np.uint8)
    if dtype is np.bool_:
        raw %= 2
    if flip is not None:
        raw[0, 1, flip // 8] ^= 1 << flip % 8
    rows = (raw[..., 0].view(np.int8) << 4 >> 4).astype(dtype) if dtype is jnp.int4 else raw.view(dtype)[..., 0]
    return values._replace(params=values.params | {"rows": rows})


def test_what_is_no_number_is_refused() -> None:
    values = state()
    with pytest.raises(ValueError, match="key<fry>"):
        checksums.summing(values._replace(guard=jax.random.key(0)), make_mesh(MESHES[0], jax.devices()[:1]))
