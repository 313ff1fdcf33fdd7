"""Gemma 2 27B compiled for a v5p-1024 by MaxText and by us, one after the other: temporary memory, seconds of a pair.

python -m tests.bench.plan_maxtext --maxtext PYTHON [--policies full minimal]

PYTHON is an interpreter with `maxtext[tpu]==0.2.5` (3.12) and the libtpu that is pinned here. 512 rows of 8192 tokens,
fsdp 512. A pair's seconds: MaxText's `optimal_seconds` of two unrolled depths, differenced; ours, the plan's estimate
of 46 layers less that of 44, and the same for the attention kernels, which that estimate does not see. 15 minutes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).parents[2]
PLAN = [
    "model=gemma2_27b",
    "cluster.slice=v5p-1024",
    "mesh.fsdp=512",
    "data.sequence=8192",
    "train.batch=512",
    "output=json",
]
MAXTEXT = [
    "model_name=gemma2-27b",
    "compile_topology=v5p-1024",
    "compile_topology_num_slices=1",
    "per_device_batch_size=1",
    "max_target_length=8192",
    "attention=flash",
]
GIB = 2**30


def ours(*overrides: str) -> dict:  # type: ignore[type-arg]
    line = [sys.executable, "-m", "launch.plan", *PLAN, *overrides]
    done = subprocess.run(line, cwd=TOP, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def our_pair(remat: str) -> float:
    """Prints ours. Returns a pair's model FLOPs by gemma.plan.flops, a chip's share at peak: what 100 % MFU takes."""
    whole, less = ours(f"train.remat={remat}"), ours(f"train.remat={remat}", "model.layers=44")
    pair_s, kernels_s = (whole["step_s"][key] - less["step_s"][key] for key in ("estimate", "kernels"))
    full_s = (whole["flops"]["model"] - less["flops"]["model"]) / 512 / 459e12
    parts = whole["hbm_bytes"]
    temporary = sum(parts[name] for name in ("gradients", "activations", "workspace"))
    report(f"ours, remat {remat}", temporary / GIB, pair_s, full_s)
    print(f"    attention kernels {kernels_s:.4f} s a pair besides; compiled in {whole['compile_s']:.0f} s")
    return full_s


def report(name: str, temporary_gib: float, pair_s: float, full_s: float) -> None:
    print(f"{name}: {temporary_gib:.2f} GiB temporary, {pair_s:.4f} s a pair, MFU {full_s / pair_s:.1%}", flush=True)


def maxtext(python: str, *options: str) -> tuple[float, float]:
    """(optimal seconds, GiB temporary)."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-16"}
    where = "import importlib.util; print(importlib.util.find_spec('maxtext').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    line = [python, "-m", "maxtext.trainers.pre_train.train_compile", f"{package}/configs/base.yml", *MAXTEXT, *options]
    with tempfile.TemporaryDirectory() as out:
        environment = os.environ | quiet | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        done = subprocess.run(line, cwd=out, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    seconds = re.search(r"optimal_seconds'?: ([\d.e-]+)", text)
    temporary = re.search(r"temp_size_in_bytes=(\d+)", text)
    if done.returncode or not seconds or not temporary:
        sys.exit(f"{' '.join(line)} ended with {done.returncode}:\n{text[-3000:]}")
    return float(seconds.group(1)), int(temporary.group(1)) / GIB


def maxtext_pair(python: str, policy: str, full_s: float) -> None:
    unrolled = ["override_model_config=true", "scan_layers=false", f"remat_policy={policy}"]
    one, two = (maxtext(python, *unrolled, f"base_num_decoder_layers={n}")[0] for n in (1, 2))
    temporary_gib = maxtext(python, f"remat_policy={policy}")[1]
    report(f"MaxText, remat {policy}", temporary_gib, two - one, full_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", metavar="PYTHON", required=True)
    parser.add_argument("--policies", nargs="+", default=["full", "minimal"])
    args = parser.parse_args()
    full_s = [our_pair(remat) for remat in ("full", "dots")][0]
    for policy in args.policies:
        maxtext_pair(args.maxtext, policy, full_s)


if __name__ == "__main__":
    main()
