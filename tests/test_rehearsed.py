"""cluster=local as a cloud: what is simulated of asking for slices, and a run that lives through it."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.record import rundir
from orchestrator.slices.cluster import Local
from orchestrator.slices.simulated import rehearsed, simulated
from orchestrator.slices.simulated.rehearsed import Cloud
from orchestrator.slices.topology import slice_type
from orchestrator.slices.upkeep import RefusedError
from orchestrator.slices.wanted import Create, State
from tests.runs import RUN, STEPS, assert_same_run, finish, launch, orphaned_folders

BEGAN = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A virtual one: its only item is the time."""
    now = [BEGAN]
    monkeypatch.setattr(rehearsed.time, "time", lambda: now[0])
    return now


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What was done to nodes, which do not exist here."""
    found: list[tuple[str, Any]] = []

    def start(cluster: simulated.Cluster, index: int, host: Any) -> None:
        cluster.nodes[index] = simulated.Node(f"node-{index}", None)  # type: ignore[arg-type]
        found.append(("start", index))

    monkeypatch.setattr(simulated, "start_node", start)
    monkeypatch.setattr(simulated, "end_nodes", lambda cluster, indices: found.append(("end", sorted(indices))))
    monkeypatch.setattr(simulated, "repair", lambda *_: None)
    monkeypatch.setattr(rehearsed, "drain", lambda cloud, nodes, deadline: found.append(("drain", deadline)))
    return found


def cloud(**settings: Any) -> Cloud:
    local = Local(**({"provision_s": 0.0, "stock_out_s": 0.0, "preempt_s": None, "notice_s": 4.0} | settings))
    nothing: Any = None
    cluster = simulated.Cluster("", "", Path(), nothing, nothing, {})
    return Cloud(slice_type("v5p-16"), local, 0.0, cluster, "mine", BEGAN)


def states(made: Cloud) -> dict[str, State]:
    return {request.name: request.state for request in rehearsed.list_requests(made)}


def test_a_slice_is_refused_waited_for_there_told_and_lost(clock: list[float], done: list[tuple[str, Any]]) -> None:
    made = cloud(stock_out_s=5.0, provision_s=3.0, preempt_s=10.0)
    clock[0] += 4.9
    with pytest.raises(RefusedError, match="no v5p-16") as refused:
        rehearsed.create(made, Create("a", "here"))
    assert refused.value.kind == "stock-out"
    clock[0] += 0.1
    rehearsed.create(made, Create("a", "here"))
    clock[0] += 2.9
    assert (states(made), done) == ({"a": State.WAITING}, [])
    clock[0] += 0.1
    assert (states(made), done) == ({"a": State.READY}, [("start", 0), ("start", 1)])
    clock[0] += 10.0
    assert states(made) == {"a": State.READY}
    assert done[2:] == [("drain", clock[0] + 4.0)]
    clock[0] += 4.0
    assert (states(made), done[3:]) == ({"a": State.LOST}, [("end", [0, 1])])


def test_only_the_first_slice_is_taken_and_only_once(clock: list[float], done: list[tuple[str, Any]]) -> None:
    made = cloud(preempt_s=10.0)
    rehearsed.create(made, Create("a", "here"))
    states(made)
    clock[0] += 1.0
    rehearsed.create(made, Create("b", "here"))
    states(made)
    for _ in range(40):
        clock[0] += 1.0
        found = states(made)
    assert found == {"a": State.LOST, "b": State.READY}
    assert [what for what, _ in done].count("drain") == 1


def test_hosts_of_two_slices_never_share_a_place(clock: list[float], done: list[tuple[str, Any]]) -> None:
    made = cloud()
    for name in ("a", "b"):
        rehearsed.create(made, Create(name, "here"))
    first, second = rehearsed.list_requests(made)
    rehearsed.delete(made, first)
    rehearsed.create(made, Create("c", "here"))
    places = [index for one in made.made.values() for index in one.hosts]
    assert sorted(places) == [0, 1, 2, 3]
    assert {request.name for request in rehearsed.list_requests(made)} == {"b", "c"}


def test_a_run_lives_through_stock_out_provisioning_and_preemption(tmp_path: Path, undisturbed: Path) -> None:
    before, folder = orphaned_folders(), tmp_path / "rehearsed"
    trouble = ["stock_out_s=1", "provision_s=1", "preempt_s=4", "notice_s=2"]
    where = [f"run.root={tmp_path}", f"run.id={folder.name}", *(f"cluster.local.{one}" for one in trouble)]
    finish(launch("train", *where, *RUN), 0)
    events = rundir.events(folder)
    assert any(event["news"].startswith("stock-out: no v5p-16") for event in events if event["event"] == "provider")
    failures = [event["outcome"] for event in events if event["event"] == "failure"]
    assert failures == ["preempted"]
    assert_same_run(undisturbed, folder, STEPS)
    assert orphaned_folders() <= before


def test_no_capacity_in_time_ends_the_run_with_2(tmp_path: Path) -> None:
    where = [f"run.root={tmp_path}", "run.id=poor", "cluster.local.stock_out_s=1000", "timeout.reserve_s=3"]
    before = orphaned_folders()
    finish(launch("train", *where, *RUN), 2)
    (given_up,) = [event for event in rundir.events(tmp_path / "poor") if event["event"] == "give_up"]
    assert given_up["reason"].startswith("no v5p-16 within")
    assert orphaned_folders() <= before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.local.provision_s=-1", "cluster.local.provision_s=-1: must be at least 0"),
        ("cluster.keep=true", "cluster.keep=true: goes with cluster=gcp and cluster=gke"),
        ("cluster.name=mine", "cluster.name=mine: goes with cluster=gcp and cluster=gke"),
        ("cluster.local=null", "cluster.local: missing; cluster=local brings it"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, override: str, said: str) -> None:
    process = launch("train", f"run.root={tmp_path / 'runs'}", override)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"train: {said}")
    assert not (tmp_path / "runs").exists()
