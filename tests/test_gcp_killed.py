"""The controller killed amid provisioning and teardown: launch.cluster finds what it left, and nothing else."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import rundir
from orchestrator.slices import cloud, upkeep
from orchestrator.slices.wanted import State
from tests import cloud_tpu
from tests.cloud import Cloud, Settings
from tests.runs import finish, launch, orphaned_folders, wait_for
from tests.test_config import config_of

PHASES = {"provisioning": 6, "teardown": 4}  # calls in which it is killed
POINTS = [
    (during, call, moment)
    for during, calls in PHASES.items()
    for call in range(1, calls + 1)
    for moment in ("before", "after")
]
SOME = POINTS[1::3]


def ours(emulated: Cloud) -> list[str]:
    return sorted(one.resource.tpu.node_spec[0].node.metadata["gemma-owner"] for one in emulated.given.values())


def killed(
    process: subprocess.Popen[str], emulated: Cloud, call: int, moment: str, armed: Callable[[], bool] = lambda: True
) -> None:
    """SIGKILL as the so-manieth call from when it is armed is begun, or was obeyed and is not answered yet."""
    seen = {"before": 0, "after": 0}

    def hook(verb: str, now: str) -> None:
        if not armed():
            return
        seen[now] += 1
        if now == moment and seen[now] == call:
            os.kill(process.pid, signal.SIGKILL)

    emulated.hook = hook


@pytest.mark.parametrize("points", [SOME, pytest.param(POINTS, marks=pytest.mark.soak)], ids=["some", "all"])
def test_wherever_it_is_killed_nothing_is_left_and_nobody_elses_is_touched(
    tmp_path: Path, points: list[tuple[str, int, str]]
) -> None:
    assert {during for during, _, _ in points} == PHASES.keys()
    settings = Settings(provision_s=0.1, delete_s=0.1, hosts=False)
    before = orphaned_folders()
    with cloud_tpu.serve(settings) as emulated:
        overrides = ["cluster=gcp", f"cluster.gcp.endpoint={emulated.endpoint}", "cluster.gcp.poll_s=0.02"]
        other = cloud.upkeep(config_of(*overrides, "run.id=other"), "other")
        with upkeep.managed(other, True, lambda *_: None):
            while State.READY not in other.states.values():
                time.sleep(0.01)
        (theirs,) = emulated.given
        left = 0
        for during, call, moment in points:
            run = f"{during}-{call}-{moment}"
            where = [f"run.root={tmp_path}", f"run.id={run}"]
            process = launch("train", *overrides, *where, "wandb.mode=disabled")
            if during == "teardown":
                wait_for(lambda: given_to(emulated, run), "a slice", process)  # noqa: B023
                wait_for(lambda: connected(tmp_path / run), "the Ray cluster", process)  # noqa: B023
            with emulated.lock:
                killed(process, emulated, call, moment, lambda: during != "teardown" or stops(tmp_path / run))  # noqa: B023
            if during == "teardown":
                process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL, (run, said)
            emulated.hook = lambda *_: None
            left += len(emulated.given) - 1
            out = finish(launch("cluster", "down", *overrides, f"run.root={tmp_path}", f"run={run}"), 0)
            assert "nothing is left" in out
            assert ours(emulated) == ["other"], run
            assert list(emulated.given) == [theirs]
        assert left > len(points) // 4  # the kills struck while there was something to leave
    assert orphaned_folders() <= before


def stops(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return '"stop"' in (folder / "events.jsonl").read_text()


def given_to(emulated: Cloud, owner: str) -> bool:
    with emulated.lock:
        return any(owner in name and name.rpartition("/")[2] in emulated.active_at for name in emulated.given)


def connected(folder: Path) -> bool:
    names = [event.get("name") for event in rundir.events(folder) if event["event"] == "phase"]
    return "reserve" in names and any(event["event"] == "provider" for event in rundir.events(folder))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shrink"], "shrink: not a verb; allowed are up, down, list, render"),
        (["down", "cluster=gcp"], "down: give one of run=ID, cluster.name=NAME, orphans=true"),
        (["up", "cluster=gcp"], "cluster.name: missing"),
        (["list"], "cluster=local: allowed are cluster=gcp"),
        (["up", "cluster=gcp", "cluster.name=x", "cluster.slice=v5p-17"], "cluster.slice=v5p-17: no such slice"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[Any], said: str) -> None:
    process = launch("cluster", *arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"cluster: {said}")
    assert err.count("\n") == 1
