"""A hundred failures in one run: does anything stay behind? Prints what the run holds as it goes, and at the end.

python -m tests.bench.soak [FAILURES] [SEED]
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from orchestrator.record import rundir
from tests.runs import launch

STEPS_APART = 12


def tree(root: int) -> list[int]:
    """A process and all below it, and those of its process groups: the simulated cluster is of other parents."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = {root}, {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def handles(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def rss_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
    except (OSError, IndexError):
        return 0.0


def main() -> None:
    failures = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    shared_before, folders_before = set(os.listdir("/dev/shm")), set(Path("/tmp").glob("gemma-*"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        steps = STEPS_APART * failures
        kinds = "[worker,worker,worker,crash,host]"
        process = launch(
            *("train", f"run.root={root}", "run.id=soak", f"train.steps={steps}", "checkpoint.every=100"),
            *("eval.every=0", "chaos=random", f"chaos.random={failures}", f"chaos.seed={seed}", f"chaos.kinds={kinds}"),
            f"retry.budget={failures}",  # dice may well strike four times between two checkpoints
        )
        print("failures  step  processes  controller: handles, MB   all: handles  /dev/shm", flush=True)
        told, pids = -1, []
        while process.poll() is None:
            events = rundir.events(root / "soak")
            count = sum(event["event"] == "failure" for event in events)
            if events and count // 10 > told and events[-1]["event"] in ("keep", "commit", "save"):
                told, pids = count // 10, tree(process.pid)
                step = max(rundir.metrics(root / "soak"), default=0)
                held = len(set(os.listdir("/dev/shm")) - shared_before)
                every = sum(map(handles, pids))
                print(
                    f"{count:8}  {step:4}  {len(pids):9}  {handles(process.pid):10}, {rss_mb(process.pid):6.0f}"
                    f"  {every:13}  {held:8}",
                    flush=True,
                )
            time.sleep(0.5)
        out, err = process.communicate()
        print(f"exit code {process.returncode}", "" if process.returncode == 0 else err[-2000:])
        time.sleep(2.0)
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and pid != os.getpid()]
        shared = sorted(set(os.listdir("/dev/shm")) - shared_before)
        folders = sorted(map(str, set(Path("/tmp").glob("gemma-*")) - folders_before))
        print(f"after the end: processes {left}, in /dev/shm {shared}, temporary folders {folders}")
        print("\n".join(out.splitlines()[:2]))


if __name__ == "__main__":
    main()
