"""Saves that storage refuses: known beforehand where they can be, told afterwards where not, on all hosts alike."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from gemma.checkpoint import saving
from gemma.checkpoint.saving import Saver
from gemma.config import Program
from tests.runs import TOP


class State(NamedTuple):
    step: Any
    weights: Any


STATE: Any = State(jnp.int32(1), jnp.asarray(np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)))


@pytest.fixture
def saver(program: Program, tmp_path: Path) -> Saver:
    return saving.open_saver(tmp_path / "checkpoints", program.checkpoint, STATE)


def save(saver: Saver, step: int) -> str | None:
    """Until it has succeeded or failed; what was in the way."""
    saving.begin(saver, step, lambda: (STATE, None))
    assert saving.settle(saver, 60.0)
    failed = saving.poll(saver)
    assert failed is None or failed.step == step
    return failed.problem if failed else None


def on_disk(saver: Saver) -> list[str]:
    return sorted(os.listdir(saver.folder))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("rank", "where"), [(0, "probe"), (1, "probe"), (0, "write"), (1, "write"), (0, "commit")])
def test_one_host_that_fails_fails_the_save_on_all_at_once_and_the_next_works(
    tmp_path: Path, rank: int, where: str
) -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    port = free_port()
    hosts = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.saving_host", *map(str, (host, port, tmp_path, rank, where))],
            cwd=TOP,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in (0, 1)
    ]
    for host in hosts:
        out, err = host.communicate(timeout=120)
        assert host.returncode == 0, err
        first, failed, again, last = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        told = failed["failed"][1]
        assert told.startswith(f"host {rank} ({socket.gethostname()}): ")
        assert failed["settled"]
        assert failed["seconds"] < 30
        assert [found["disk"] for found in (first, failed, again, last)] == [["1"], ["1"], ["2"], ["3"]]
        assert [found["failed"] for found in (first, again, last)] == [None] * 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mount: not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_meanwhile_costs_that_save_only_and_no_space(program: Program, small_disk: Path) -> None:
    saver = saving.open_saver(small_disk, program.checkpoint, STATE)
    assert save(saver, 1) is None
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_400_000))
    before = os.statvfs(small_disk).f_bfree
    assert "GB free, a checkpoint takes 0.00105 GB" in (save(saver, 2) or "")
    saver.bytes = 0  # as if another had filled the disk after the question
    assert "No space left on device" in (save(saver, 2) or "")
    assert os.statvfs(small_disk).f_bfree == before
    assert on_disk(saver) == ["1", "filler"]
    filler.unlink()
    assert save(saver, 2) is None
    assert on_disk(saver) == ["2"]


def test_storage_that_does_not_answer_holds_up_one_save_for_a_while_and_the_next_not_at_all(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    ask = saving.refusal
    monkeypatch.setattr(saving, "PROBE_S", 0.05)
    monkeypatch.setattr(saving, "refusal", lambda *_: "late" if answered.wait(60) else "never")
    assert "has not answered for" in (save(saver, 1) or "")
    monkeypatch.setattr(saving, "PROBE_S", 60.0)
    assert "has not answered since" in (save(saver, 1) or "")
    answered.set()
    assert saver.probing
    saver.probing.join()
    monkeypatch.setattr(saving, "refusal", ask)
    assert save(saver, 1) is None
    assert on_disk(saver) == ["1"]


def test_a_save_fails_while_the_one_before_takes_too_long(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(saving, "BUSY_S", 0.05)
    with monkeypatch.context() as busy:
        busy.setattr(saving, "refusal", lambda *_: None if go_on.wait(60) else "never")
        saving.begin(saver, 1, lambda: (STATE, None))
        saving.begin(saver, 2, lambda: pytest.fail("there is no room for a copy"))
        go_on.set()
        assert saving.settle(saver, 60.0)
    failed = saving.poll(saver)
    assert failed
    assert failed.step == 2
    assert "the save before is not done" in failed.problem
    assert on_disk(saver) == ["1"]
    assert save(saver, 2) is None


def test_a_failure_is_told_once(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(saver.manager, "wait_until_finished", lambda: (_ for _ in ()).throw(OSError(28, "full")))
        saving.begin(saver, 1, lambda: (STATE, None))
        assert saving.settle(saver, 60.0)
    failed = saving.poll(saver)
    assert failed
    assert (failed.step, failed.problem) == (1, f"host 0 ({socket.gethostname()}): full")
    assert saving.poll(saver) is None


def test_what_trains_on_is_not_held_up(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(saving, "refusal", lambda *_: None if go_on.wait(60) else "never")
    saving.begin(saver, 1, lambda: (STATE, None))  # returns
    assert not saving.settle(saver, 0.0)
    go_on.set()
    assert saving.settle(saver, 60.0)
    assert on_disk(saver) == ["1"]
