"""The controller killed amid provisioning and teardown of a RayCluster: launch.cluster finds what it left, and nothing
else. Nobody is behind the pods here.
"""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.slices import gke, upkeep
from orchestrator.slices.wanted import State
from tests import kuberay
from tests.kube import Kube, Settings
from tests.runs import finish, launch, orphaned_folders, wait_for
from tests.test_config import config_of
from tests.test_gcp_killed import POINTS, SOME, killed

LANES = 2  # at once, each with a Kubernetes of its own
COMPOSING = threading.Lock()  # Hydra has one state for all


def owners(emulated: Kube) -> list[str]:
    return sorted(one.body["metadata"]["annotations"]["gemma-owner"] for one in emulated.made.values())


@pytest.mark.parametrize("points", [SOME, pytest.param(POINTS, marks=pytest.mark.soak)], ids=["some", "all"])
def test_wherever_it_is_killed_nothing_is_left_and_nobody_elses_is_touched(
    tmp_path: Path, points: list[tuple[str, int, str]]
) -> None:
    before = orphaned_folders()
    with ThreadPoolExecutor(LANES) as pool:
        left = list(pool.map(kill_at, [points[lane::LANES] for lane in range(LANES)], [tmp_path] * LANES))
    assert sum(left) > len(points) // 4  # the kills struck while there was something to leave
    assert orphaned_folders() <= before


def kill_at(points: list[tuple[str, int, str]], root: Path) -> int:
    """How many RayClusters killed controllers left, none of which is there at the end."""
    left = 0
    with kuberay.serve(Settings(provision_s=0.1, delete_s=0.1, hosts=False)) as emulated:
        overrides = [*kuberay.overrides(emulated), "cluster.gke.poll_s=0.02"]
        with COMPOSING:
            config = config_of(*overrides, "run.id=other")
        other = gke.upkeep(config, "other")
        with upkeep.managed(other, True, lambda *_: None):
            while State.READY not in other.states.values():
                time.sleep(0.01)
        (theirs,) = emulated.made
        for during, call, moment in points:
            run = f"{during}-{call}-{moment}"
            process = launch("train", *overrides, f"run.root={root}", f"run.id={run}", "wandb.mode=disabled")
            if during == "teardown":
                wait_for(lambda: run in owners(emulated), "a RayCluster", process)  # noqa: B023
            with emulated.lock:
                if during == "teardown":
                    process.send_signal(signal.SIGTERM)
                killed(process, emulated, call, moment)  # type: ignore[arg-type]
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL, run
            emulated.hook = lambda *_: None
            left += len(emulated.made) - 1
            if call == 1:
                out = finish(launch("cluster", "down", *overrides, f"run.root={root}", f"run={run}"), 0)
                assert "nothing is left" in out
            else:  # what that does, without its start
                assert upkeep.clear(gke.open_provider(config, ""), run, 0.02, lambda *_: None, patient=True) == []
            assert owners(emulated) == ["other"], run
            assert list(emulated.made) == [theirs]
    return left
