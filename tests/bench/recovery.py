"""From a fault to the next new step: a killed host process, a lost host; beside Ray Train's JaxTrainer in one go.

python -m tests.bench.recovery [ROUNDS] [PEER_PYTHON PEER_SCRIPT]     both kinds of fault, two of each a round

Ours is `model=tiny` on the simulated v5p-16, the peer's a trivial step. The peer is left out where its script is not
given; its Python needs ray[train].
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.record import rundir
from tests.runs import finish, launch, wait_for_step

TOP = Path(__file__).parents[2]
STRIKES = 2  # of each kind a round
APART = 40  # steps


def ours(root: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """Strikes at random moments; what became of each."""
    steps = APART * (STRIKES + 1)
    overrides = [f"run.root={root}", f"run.id={name}", f"train.steps={steps}", "checkpoint.every=1000", "eval.every=0"]
    process = launch("train", *overrides)
    folder, times = root / name, []
    for strike in range(STRIKES):
        wait_for_step(process, folder, APART * strike + 25)
        pids = [e["pids"] for e in rundir.events(folder) if e["event"] == "start"][-1]
        time.sleep(0.037 * (strike + 1))
        times.append(time.time())
        for pid in [pids[strike % 2]] if kind == "process" else host_of(pids[strike % 2]):
            os.kill(pid, signal.SIGKILL)
    finish(process, 0)
    return [after(folder, at) for at in times]


def host_of(pid: int) -> list[int]:
    """A simulated host: the Ray node that a process belongs to, and all its processes."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    node = parents[pid]
    return [node, *(child for child, parent in parents.items() if parent == node)]


def after(folder: Path, at: float) -> dict[str, Any]:
    rows = list(rundir.read_lines(folder / "metrics.jsonl"))
    done = max(row["step"] for row in rows if row["time"] < at)
    new = min(row["time"] for row in rows if row["time"] > at and row["step"] > done)
    events = [event for event in rundir.events(folder) if event["time"] > at]
    seen = {name: next(event["time"] for event in events if event["event"] == name) - at for name in EVENTS}
    incidents = json.loads((folder / "goodput.json").read_text())["incidents"]
    incident = min(incidents, key=lambda one: abs(one["time"] - at))
    return {"new_step_s": new - at, "lost": incident["steps_lost"]} | seen


EVENTS = ("failure", "reserve", "start", "restore")


def peer(command: list[str]) -> list[tuple[float, int]]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    found = re.findall(r"next step after ([\d.]+) s, (-?\d+) steps lost", done.stdout)
    assert found, done.stdout + done.stderr
    return [(float(seconds), int(lost)) for seconds, lost in found]


def told(name: str, found: list[dict[str, Any]]) -> float:
    median = statistics.median(one["new_step_s"] for one in found)
    parts = ", ".join(f"{key} {statistics.median(one[key] for one in found):.2f}" for key in EVENTS)
    every = " ".join(f"{one['new_step_s']:.2f}" for one in found)
    print(f"{name}: next new step after {every} s, median {median:.2f}; steps lost {[one['lost'] for one in found]}")
    print(f"    medians on the way there: {parts}")
    return median


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    command = sys.argv[2:4]
    killed, lost, peers = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        finish(launch("train", f"run.root={root}", "run.id=warm", "train.steps=30", "eval.every=0"), 0)
        for round_ in range(rounds):
            killed += ours(root, f"process-{round_}", "process")
            if command:
                peers += peer(command)
            lost += ours(root, f"host-{round_}", "host")
    mine = told("a process killed", killed)
    told("a host lost", lost)
    beyond = statistics.median(one["new_step_s"] - one["reserve"] for one in lost)
    print(f"    beyond the arrival of its replacement: median {beyond:.2f} s")
    if peers:
        theirs = statistics.median(seconds for seconds, _ in peers)
        print(f"JaxTrainer: {[round(s, 2) for s, _ in peers]} s, median {theirs:.2f}; lost {[n for _, n in peers]}")
        print(f"ratio ours / JaxTrainer: {mine / theirs:.2f}")


if __name__ == "__main__":
    main()
