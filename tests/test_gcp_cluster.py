"""launch.cluster against the emulator, no hosts behind it: whose slices are given back, and whose are not."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma.config import ConfigError
from launch import cluster, detached
from orchestrator import jobs
from orchestrator.config import Config
from orchestrator.record import rundir
from orchestrator.record.rundir import Detached
from orchestrator.slices import cloud
from orchestrator.slices.upkeep import Provider, RefusedError
from orchestrator.slices.wanted import Create, State
from tests import cloud_tpu
from tests.cloud import Cloud, Settings
from tests.test_config import config_of
from tests.test_rundir import fabricate

ZONES = ("us-east5-a", "us-central1-a", "europe-west4-b")


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.chdir(tmp_path)  # where ./runs would be
    settings = Settings(provision_s=0.0, delete_s=0.0, hosts=False, stock=dict.fromkeys(ZONES[1:], 0))
    with cloud_tpu.serve(settings) as served:
        yield served


def config(emulated: Cloud, *overrides: str) -> Config:
    gcp = ["cluster=gcp", f"cluster.gcp.endpoint={emulated.endpoint}", "cluster.gcp.poll_s=0.02"]
    return config_of(*gcp, f"run.root={os.getcwd()}/elsewhere", *overrides)


def provide(emulated: Cloud, *owners: str, zone: str = ZONES[0]) -> None:
    for owner in owners:
        cloud.open_provider(config(emulated), owner).create(Create(f"of-{owner}", zone))


def owners(emulated: Cloud) -> list[str]:
    return sorted(one.resource.tpu.node_spec[0].node.metadata["gemma-owner"] for one in emulated.given.values())


def note(root: str, run: str) -> None:
    detached.note(Path(root, run), Detached("127.0.0.1:9", "/there"))


def driven(monkeypatch: pytest.MonkeyPatch, **ended: bool) -> None:
    """What the dashboard of every cluster tells of runs."""

    def find(head: object, run: str) -> jobs.Job:
        if run not in ended:
            raise ConfigError(f"run={run}: no such run is known to the Ray cluster at x")
        return jobs.Job("id", run, "/there", "died" if ended[run] else "running", 0.0, ended[run])

    monkeypatch.setattr(jobs, "connect", lambda at: None)
    monkeypatch.setattr(jobs, "find", find)


def test_latest_is_the_newest_run_here(emulated: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="^run=latest: no runs in run.root="):
        cluster.down(config(emulated), "latest", orphans=False)
    fabricate(Path("elsewhere"), "old", created=1.0)
    fabricate(Path("elsewhere"), "new", created=2.0)
    provide(emulated, "old", "new")
    assert cluster.down(config(emulated), "latest", orphans=False) == 0
    assert owners(emulated) == ["old"]
    assert "run=new: nothing is left" in capsys.readouterr().out


def test_an_owner_without_slices_is_told_from_one_whose_were_given_back(
    emulated: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    provide(emulated, "some", "other")
    assert cluster.down(config(emulated), "sone", orphans=False) == 0
    said = "run=sone has no slices, so nothing is left of it; owners with slices: other, some\n"
    assert capsys.readouterr().out == said
    assert cluster.down(config(emulated, "cluster.name=some"), "", orphans=False) == 0
    assert capsys.readouterr().out.endswith("cluster.name=some: nothing is left\n")
    assert owners(emulated) == ["other"]


def test_orphans_are_what_dead_runs_left_and_all_others_are_named(
    emulated: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path("elsewhere")
    for run in ("dead", "driven"):
        fabricate(root, run)
    fabricate(root, "kept", "cluster=gcp", "cluster.keep=true")
    lock = rundir.lock(root / "driven")
    for run in ("away", "ended", "lost"):
        note(detached.HERE, run)
    driven(monkeypatch, away=False, ended=True)
    all_owners = ["away", "dead", "driven", "ended", "kept", "lost", "stranger"]
    provide(emulated, *all_owners)
    assert cluster.down(config(emulated), "", orphans=True) == 0
    lock.close()
    out = capsys.readouterr().out
    assert owners(emulated) == [owner for owner in all_owners if owner != "dead"]
    reasons = {name: why for name, _, why in (line.partition(": not given back: ") for line in out.splitlines()) if why}
    assert list(reasons) == owners(emulated)
    assert reasons["stranger"].startswith("no such run is in run.root=")
    assert "which does not tell (run=lost: no such run" in reasons["lost"]
    assert "cluster.keep=true" in reasons["kept"]
    assert "its job has ended (died)" in reasons["ended"]
    assert "run=dead: nothing is left" in out


@pytest.mark.parametrize("below", ["elsewhere", detached.HERE])
def test_a_run_whose_cluster_cannot_be_asked_is_given_back_only_by_force(
    emulated: Cloud, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    note(below, "away")
    provide(emulated, "away")
    with pytest.raises(ConfigError, match=r"^run=away: may be driven: .*127.0.0.1:9.*no dashboard.*; force=true "):
        cluster.down(config(emulated), "away", orphans=False)
    driven(monkeypatch, away=False)
    with pytest.raises(ConfigError, match="^run=away: is being driven by a job on a cluster; launch.stop run=away"):
        cluster.down(config(emulated), "away", orphans=False, force=True)
    assert owners(emulated) == ["away"]
    driven(monkeypatch)  # another cluster answers at that address
    with pytest.raises(ConfigError, match=r"^run=away: may be driven: .*; force=true "):
        cluster.down(config(emulated), "away", orphans=False)
    assert cluster.down(config(emulated), "away", orphans=False, force=True) == 0
    assert owners(emulated) == []


def test_a_request_that_waits_is_listed_without_cost(emulated: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    provide(emulated, "ready")
    provide(emulated, "queued", zone=ZONES[1])
    fabricate(Path("elsewhere"), "queued", "cluster=gcp", "cluster.keep=true")
    priced = config(emulated, "cluster.price_per_chip_hour=4.2")
    deadline = time.monotonic() + 20.0
    while State.READY not in {r.state for r in cloud.open_provider(priced, "").list_requests()}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cluster.show(priced)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["of-queued"][4:7] == ["waiting", "queued", "(kept)"]
    assert rows["of-queued"][-2:] == ["-", "-"]
    assert rows["of-ready"][-2:] == ["0.0", "0"]


def test_a_provider_that_never_tells_is_not_taken_for_nothing_left(
    emulated: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(kind: str) -> Provider:
        def list_requests() -> list[object]:
            raise RefusedError(kind, "no")  # type: ignore[arg-type]

        return Provider(list_requests, None, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(cluster.upkeep, "CLEAR_TIMEOUT_S", 0.1)
    assert cluster.delete_all(config(emulated), refuse("trouble"), "run", "some") == 2
    assert "nothing is left" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="^cluster=gcp: no$"):
        cluster.delete_all(config(emulated), refuse("forbidden"), "run", "some")
