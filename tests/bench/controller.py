"""What the controller costs: steps/s through it over steps/s of two bare JAX processes, the same step, interleaved.

python -m tests.bench.controller [PAIRS] [STEPS]
"""

import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator.record import rundir

TOP = Path(__file__).parents[2]
WARMUP = 20
OVERRIDES = ["eval.every=0", "checkpoint.every=0"]


def controlled(root: Path, name: str, steps: int) -> float:
    """Seconds a step, everything between the warm-up and the last step's loss counted."""
    command = [sys.executable, "-m", "launch.train", f"run.root={root}", f"run.id={name}", f"train.steps={steps}"]
    subprocess.run([*command, *OVERRIDES], cwd=TOP, check=True, capture_output=True, timeout=600)
    rows = rundir.metrics(root / name)
    return statistics.mean(rows[step]["step_s"] for step in range(WARMUP + 2, steps + 1))


def bare(root: Path, like: str, steps: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    manifest = rundir.read_manifest(root / like)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        rundir.write_json(config, manifest.config)
        processes = [
            subprocess.Popen(
                [sys.executable, "tests/bench/bare.py", str(rank), "2", str(port), str(steps), str(WARMUP)]
                + [str(config), manifest.config["run"]["cache"], folder],
                cwd=TOP,
                env=os.environ | {"PYTHONPATH": str(TOP)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(2)
        ]
        out = [process.communicate(timeout=600)[0] for process in processes]
    found = re.search(r"seconds_a_step ([\d.]+)", out[0])
    assert found, f"the bare script said {out}"
    return float(found.group(1))


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        controlled(root, "warm", steps)  # compiles; not counted
        ratios, with_s, without_s = [], [], []
        for pair in range(pairs):
            runs = [lambda: bare(root, "warm", steps), lambda p=pair: controlled(root, f"run-{p}", steps)]
            if pair % 2:  # neither always comes first
                with_s.append(runs[1]())
                without_s.append(runs[0]())
            else:
                without_s.append(runs[0]())
                with_s.append(runs[1]())
            ratios.append(without_s[-1] / with_s[-1])
            print(f"bare {without_s[-1] * 1e3:.1f} ms, controller {with_s[-1] * 1e3:.1f} ms, ratio {ratios[-1]:.3f}")
    bare_ms, with_ms = statistics.median(without_s) * 1e3, statistics.median(with_s) * 1e3
    print(
        f"median of {pairs} interleaved pairs, {steps} steps each: bare {bare_ms:.1f} ms, controller {with_ms:.1f} ms"
    )
    print(f"steps/s through the controller over bare: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
