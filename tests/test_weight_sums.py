"""Weights are taken from a checkpoint only as they were saved: the sums that `resume` looks at, at the other doors."""

import shutil
from pathlib import Path

import pytest

from gemma.checkpoint import disk
from gemma.config import Mesh
from gemma.weights import sums
from gemma.weights.arrays import open_arrays
from gemma.weights.layout import WeightsError
from tests.test_integrity import STEP, config
from tests.test_sums import placed, state

SLAB_BYTES = 64  # so that even small arrays are read in several slabs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    summing, put = placed(state(), Mesh(1, 4, 2))
    with disk.open_manager(folder, config()) as manager:
        disk.save(manager, STEP, put, summing(put))
        manager.wait_until_finished()
    return folder / str(STEP) / "default"


def arrays(folder: Path) -> dict[str, object]:
    stored = open_arrays(folder)
    return {".".join(name[1:]): stored.open(name) for name in sorted(stored.names) if name[0] == "params"}


def test_numpy_s_sums_are_those_of_the_devices(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "SLAB_BYTES", SLAB_BYTES)
    noted, found = sums.saved(saved), arrays(saved)
    assert found
    for leaf, array in found.items():
        assert sums.sum_of(array, leaf) == noted[f"params.{leaf}"], leaf
    sums.check(saved, found, "params")


def test_a_changed_byte_of_any_array_file_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    """Every tenth of each file's bytes; what TensorStore itself refuses is refused too."""
    refused = 0
    files = [path.relative_to(saved.parent) for path in saved.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for name in files:
        whole = (saved.parent / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 10)):
            copy = Path(shutil.copytree(saved.parent, tmp_path / f"{name.name}-{at}"))
            (copy / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            try:
                sums.check(copy / "default", arrays(copy / "default"), "params")
            except WeightsError:
                refused += 1
                continue
            intact = sums.saved(copy / "default")
            for leaf, array in arrays(copy / "default").items():
                assert sums.sum_of(array, leaf) == intact[f"params.{leaf}"]
    assert refused > 0


def test_a_note_that_cannot_be_read_is_refused(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved.parent, tmp_path / "copy"))
    (copy / sums.METADATA).write_text("{")
    with pytest.raises(WeightsError, match=sums.METADATA):
        sums.check(copy / "default", arrays(copy / "default"), "params")
