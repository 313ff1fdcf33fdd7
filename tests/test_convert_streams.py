"""A conversion's memory is a tensor's, not the model's; and one that is stopped leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma.config import Model
from gemma.weights import hf, layout
from tests import hf_cases

TOP = Path(__file__).parents[1]
# 340 MB in 200 tensors; the largest is the embedding's 16 MB.
LARGE = replace(hf_cases.SMALL, vocab=8000, width=1024, layers=18, heads=4, kv_heads=2, head_size=64, hidden=2500)
PEAK = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "launch.convert", *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written a tensor at a time: a child's peak starts at what its parent held."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    folder.mkdir()
    kind = np.dtype(np.float32)
    tensors = {name: (shape, kind) for name, shape in layout.tensor_shapes(LARGE, layout.HF).items()}
    rng = np.random.default_rng(0)
    hf.write_shard(folder / hf.SINGLE, tensors, (rng.random(shape, kind) for shape, _ in tensors.values()))
    (folder / "config.json").write_text(json.dumps(hf_cases.config_json(LARGE)))
    return folder


def peak_bytes(*arguments: str) -> int:
    out = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=TOP, capture_output=True, text=True, timeout=200)
    code, peak = out.stdout.split()
    assert code == "0", out.stderr
    return int(peak)


def total_bytes(model: Model) -> int:
    return sum(int(np.prod(shape)) * 4 for shape in layout.tensor_shapes(model, layout.HF).values())


def test_the_peak_is_a_tensor_and_a_little(large: Path, tmp_path: Path) -> None:
    idle = peak_bytes("--help")
    there = peak_bytes(f"from={large}", f"to={tmp_path}/ours") - idle
    back = peak_bytes(f"from={tmp_path}/ours", f"to={tmp_path}/back") - idle
    total, largest = total_bytes(LARGE), 8000 * 1024 * 4
    print(f"above an idle {idle >> 20} MiB: import {there >> 20}, export {back >> 20}; model {total >> 20} MiB")
    assert max(there, back) < largest + (80 << 20) < total / 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing(how: signal.Signals, large: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.convert", f"from={large}", f"to={tmp_path}/ours"]
    process = subprocess.Popen(command, cwd=TOP, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".ours.partial-*/checkpoint/d/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, how)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, list(tmp_path.iterdir())) == (1, [])
    assert err.strip().splitlines() == [f"convert: to={tmp_path}/ours: stopped; nothing is left there"]
