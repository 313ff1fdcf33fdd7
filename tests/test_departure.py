"""Machines that say that they will be taken away: to Ray, or by Google's metadata server. The run moves on in time."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from orchestrator.hosts import fleet as fleets
from orchestrator.hosts.keeper import NOTICE, Held, Keeper
from orchestrator.record import rundir
from orchestrator.slices import metadata
from orchestrator.slices.lease import Lease, avoided
from tests import existing_cluster, metadata_server
from tests.runs import RUN, STEPS, assert_same_run, finish, goodput, launch, wait_for_step
from tests.test_config import config_of


@pytest.mark.parametrize(
    ("key", "said"),
    [("instance/preempted", "TRUE"), ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_the_metadata_server_says_that_a_machine_goes(key: str, said: str) -> None:
    with metadata_server.serve() as machine:
        assert metadata.notice(machine.host) is None
        machine.says[key] = said
        assert said in str(metadata.notice(machine.host))


def test_a_metadata_server_that_lacks_a_key_says_that_the_machine_stays() -> None:
    with metadata_server.serve() as machine:
        machine.says.clear()
        assert metadata.notice(machine.host) is None


def test_without_a_metadata_server_nothing_is_known() -> None:
    with metadata_server.serve() as machine:
        pass
    with pytest.raises(OSError):
        metadata.notice(machine.host)


def wait(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_keeper_tells_the_process_at_work_and_takes_it_back() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with metadata_server.serve() as machine:
        keeper = Keeper("127.0.0.1", math.inf, machine.host)
        keeper.watch(sleeper.pid)
        assert keeper.inventory().notice is None
        machine.says["instance/preempted"] = "TRUE"
        assert sleeper.wait(10) == -NOTICE
        assert keeper.inventory().notice == "metadata server: preempted TRUE"
        machine.says["instance/preempted"] = "FALSE"
        wait(lambda: keeper.inventory().notice is None)


def drain(address: str) -> None:
    """Tells Ray that host 1 of slice s0 will be gone in a minute."""
    ray.init(address, log_to_driver=False)
    try:
        labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    finally:
        ray.shutdown()
    wanted = {"ray.io/tpu-slice-name": "s0", "ray.io/tpu-worker-id": "1"}
    (node,) = [node for node, there in labels.items() if wanted.items() <= there.items()]
    why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}"]
    subprocess.run([*command, f"--node-id={node}", *why], check=True, capture_output=True)


# A drain by Ray is always tested: test_faults.py, test_an_announced_departure_saves_moves_on_and_is_free.
@pytest.mark.parametrize("by", ["metadata server", pytest.param("drained", marks=pytest.mark.soak)])
def test_a_host_about_to_go_is_left_for_another_slice(undisturbed: Path, tmp_path: Path, by: str) -> None:
    folder = tmp_path / by.replace(" ", "-")
    with metadata_server.serve() as machine, existing_cluster.cluster("2", machine.host) as address:
        process = launch(
            *("train", f"run.root={tmp_path}", f"run.id={folder.name}", *RUN),
            *("cluster=ray", f"cluster.address={address}", "retry.budget=0"),
        )
        wait_for_step(process, folder, 5)
        if by == "drained":
            drain(address)
        else:
            machine.says["instance/preempted"] = "TRUE"
        finish(process, 0)
    (found,) = goodput(folder)["incidents"]
    assert (found["outcome"], found["rank"], found["steps_lost"]) == ("preempted", 1, 0)
    assert by in found["evidence"]
    commits = [event["step"] for event in rundir.events(folder) if event["event"] == "commit"]
    assert found["step"] in commits
    assert_same_run(undisturbed, folder, STEPS)


def test_a_warned_host_that_falls_silent_stays_warned() -> None:
    """Ray takes it for alive for some seconds after it is gone: the run would be placed there again."""
    given = Lease(lambda: None, avoided, lambda: None)
    fleet = fleets.Fleet(config_of(), "space", given, notices={"silent": "going", "stays": "going"})
    told = Held(("127.0.0.1", 1), {}, {}, 0, {}, 0, None)
    fleets.note_departures(fleet, {"stays": told, "goes": replace(told, notice="going")})
    assert fleet.notices == {"silent": "going", "goes": "going"}
