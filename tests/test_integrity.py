"""A checkpoint with a changed byte, or a file cut short or gone: refused by name, or given back to the bit.

In every file that a save writes, whatever it is for. The state is never another one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma.checkpoint import disk
from gemma.checkpoint.disk import CheckpointError
from gemma.config import Checkpoint, Mesh
from tests.test_sums import placed, state

STEP = 5  # that `state` is at
FLIPS = 4  # bytes of a file, of its two ends and in between


def config() -> Checkpoint:
    return Checkpoint(0, 0.0, 1, 0, "off", 0.01, 60.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    summing, put = placed(state(), Mesh(1, 4, 2))
    with disk.open_manager(folder, config()) as manager:
        disk.save(manager, STEP, put, summing(put))
        manager.wait_until_finished()
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def restored_as_saved(folder: Path) -> bool:
    """Whether it is given back; then it is to the bit. False where it is refused by name."""
    summing, put = placed(state(), Mesh(1, 4, 2))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), put)
    try:
        with disk.open_manager(folder, config()) as manager:
            found = disk.restore(manager, STEP, abstract, summing)
    except CheckpointError as error:
        problem = str(error)
    else:
        problem = ""
    if problem:
        assert str(folder / str(STEP)) in problem
        return False
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(put), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    return True


def flipped(whole: bytes) -> list[bytes | None]:
    draw = np.random.default_rng(len(whole))
    at = {0, len(whole) - 1, *draw.integers(0, len(whole), FLIPS - 2).tolist()} if whole else set()
    return [whole[:i] + bytes([whole[i] ^ 1 << int(draw.integers(8))]) + whole[i + 1 :] for i in sorted(at)]


def cut_short(whole: bytes) -> list[bytes | None]:
    return [whole[: len(whole) // 2], b""]


def gone(whole: bytes) -> list[bytes | None]:
    return [None]


def test_it_comes_back_as_it_was_saved(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert restored_as_saved(tmp_path / "copy")


# Orbax leaves coroutines behind where it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("change", [flipped, cut_short, gone])
def test_every_file(saved: Path, tmp_path: Path, change: Callable[[bytes], list[bytes | None]]) -> None:
    for name in files(saved):
        results = []
        for changed in change((saved / name).read_bytes()):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            shutil.copytree(saved, folder)
            (folder / name).unlink()
            if changed is not None:
                (folder / name).write_bytes(changed)
            results.append(restored_as_saved(folder))
        assert not (any(results) and name.startswith(f"{STEP}/default/d/")), f"{name} holds the arrays"
