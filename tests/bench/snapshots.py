"""What snapshots and checkpoints cost: steps/s with them over steps/s without, interleaved, the same seed.

python -m tests.bench.snapshots [PAIRS] [STEPS]
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator import rundir

TOP = Path(__file__).parents[2]
WARMUP = 25
KINDS = {
    "neither": ["checkpoint.snapshot=off", "checkpoint.every=0"],
    "snapshots": ["checkpoint.snapshot=auto", "checkpoint.every=0"],
    "checkpoints every 20": ["checkpoint.snapshot=off", "checkpoint.every=20"],
    "both": ["checkpoint.snapshot=auto", "checkpoint.every=20"],
}


def rate(root: Path, name: str, steps: int, overrides: list[str]) -> float:
    """Steps/s by the clock, from the end of the warm-up to the last step but those around the final save."""
    command = [sys.executable, "-m", "launch.train", f"run.root={root}", f"run.id={name}", f"train.steps={steps}"]
    subprocess.run(
        [*command, "eval.every=0", "wandb.mode=disabled", *overrides], cwd=TOP, check=True, capture_output=True
    )
    rows = rundir.metrics(root / name)
    return (steps - 1 - WARMUP) / (rows[steps - 1]["time"] - rows[WARMUP]["time"])


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 150
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rate(root, "warm", 40, [])
        for pair in range(pairs):
            order = list(KINDS) if pair % 2 == 0 else list(reversed(KINDS))
            for kind in order:
                found[kind].append(rate(root, f"{kind.replace(' ', '-')}-{pair}", steps, KINDS[kind]))
            print(", ".join(f"{kind} {found[kind][-1]:.2f}" for kind in KINDS), "steps/s", flush=True)
    base = found["neither"]
    print(f"neither: median {statistics.median(base):.2f} steps/s, {1e3 / statistics.median(base):.0f} ms a step")
    for kind in list(KINDS)[1:]:
        ratios = [with_it / without for with_it, without in zip(found[kind], base, strict=True)]
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        medians = statistics.median(found[kind]) / statistics.median(base)
        print(f"{kind}: over neither {shown}; median of the pairs {statistics.median(ratios):.3f}, {medians=:.3f}")


if __name__ == "__main__":
    main()
