"""Real runs for tests: the command as a user types it, in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.record import rundir

TOP = Path(__file__).parents[1]
DEADLINE_S = 240.0
# Small corpora tokenise at once; compiled programs are shared by the tests of one session.
SMALL = ["train.steps=40", "checkpoint.every=10", "eval.every=20", "eval.rows=16", "optim.warmup_steps=5"]
# A run that others are held against: the fixture `undisturbed`.
STEPS = 60
RUN = [f"train.steps={STEPS}", "checkpoint.every=20", "eval.every=0", "train.dtype=float32", "wandb.mode=disabled"]


def launch(command: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"launch.{command}", *overrides],
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"WANDB_MODE": "offline"},
    )


def finish(process: subprocess.Popen[str], code: int, deadline_s: float = DEADLINE_S) -> str:
    """Waits for a command and returns its standard output; fails with everything it said on another exit code."""
    out, err = process.communicate(timeout=deadline_s)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{err}"
    return out


def wait_for(ready: Callable[[], bool], what: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}"
        time.sleep(0.02)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    wait_for(lambda: max(rundir.metrics(folder), default=0) >= step, f"step {step}", process)


def kill_worker(folder: Path, rank: int) -> int:
    """SIGKILLs the newest attempt's process of a rank; returns its pid."""
    pids = [e["pids"] for e in rundir.events(folder) if e["event"] == "start"][-1]
    os.kill(pids[rank], signal.SIGKILL)
    return pids[rank]


def losses(folder: Path) -> dict[int, float]:
    return {step: row["loss"] for step, row in rundir.metrics(folder).items()}


def parameters(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path in the tree, read by Orbax as plain NumPy."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        path = folder / "checkpoints" / str(step) / "default"
        shapes = checkpointer.metadata(path).item_metadata.tree
        abstract = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), shapes)
        tree = checkpointer.restore(path, abstract)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(value) for key, value in flat}


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    """Bit for bit: the loss of every step, and every array of the final state."""
    assert losses(one) == losses(other)
    assert sorted(losses(one)) == list(range(1, steps + 1))
    first, second = parameters(one, steps), parameters(other, steps)
    assert first.keys() == second.keys()
    assert first
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


def event_names(folder: Path) -> list[str]:
    return [event["event"] for event in rundir.events(folder)]


def goodput(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "goodput.json").read_text())


def orphaned_folders() -> set[Path]:
    """The temporary folders of simulated clusters that no living process is named after: their reaper is gone."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(file.read_text(errors="replace"))
    return {path for path in Path("/tmp").glob("gemma-*") if not any(str(path) in line for line in lines)}
