"""launch.train cluster=gcp against the emulator, whose slices' hosts are Ray nodes on this machine."""

from pathlib import Path

import pytest

from orchestrator.record import rundir
from tests import cloud_tpu
from tests.cloud import Settings, preempt
from tests.runs import RUN, STEPS, assert_same_run, finish, launch, losses, orphaned_folders, wait_for_step


def test_a_preemption_in_the_middle_ends_bitwise_like_an_undisturbed_run(tmp_path: Path, undisturbed: Path) -> None:
    before = orphaned_folders()
    folder = tmp_path / "cloud"
    with cloud_tpu.serve(Settings(provision_s=1.0, notice_s=30.0)) as emulated:
        where = ["cluster=gcp", f"cluster.gcp.endpoint={emulated.endpoint}", "cluster.gcp.poll_s=0.2"]
        where += ["cluster.slice=v5p-16", f"run.root={tmp_path}", f"run.id={folder.name}"]
        process = launch("train", *where, *RUN)
        wait_for_step(process, folder, 10)
        with emulated.lock:
            preempt(emulated, next(iter(emulated.given.values())))
        finish(process, 0)
        assert emulated.given == {}
        assert len(emulated.active_at) == 2
    failures = [(e["outcome"], e["evidence"]) for e in rundir.events(folder) if e["event"] == "failure"]
    assert [outcome for outcome, _ in failures] == ["preempted"], failures
    assert_same_run(undisturbed, folder, STEPS)
    assert orphaned_folders() <= before


def test_no_quota_ends_the_run_with_2_its_name_said_once_and_nothing_left(tmp_path: Path) -> None:
    zones = "us-east5-a,us-central1-a,europe-west4-b"
    with cloud_tpu.serve(Settings(quota=tuple(zones.split(",")), hosts=False)) as emulated:
        where = ["cluster=gcp", f"cluster.gcp.endpoint={emulated.endpoint}", "cluster.gcp.poll_s=0.2"]
        process = launch("train", *where, f"run.root={tmp_path}", "run.id=poor", *RUN)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 2
        assert (out + err).count("gave up: no zone's quota allows a v5p-16") == 1
        assert "TPUV5sPodPerProjectPerZoneForTPUAPI" in out + err
        assert emulated.given == {}
    assert losses(tmp_path / "poor") == {}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.slice=v5p-17"], "cluster.slice=v5p-17: no such slice; allowed: v5p-8, v5p-16"),
        (
            ["cluster.slice=v5p-64", "cluster.topology=2x2x9"],
            "cluster.topology=2x2x9: allowed for cluster.slice=v5p-64",
        ),
        (
            ["mesh.fsdp=16", "train.batch=16"],
            "mesh.replica=1 mesh.fsdp=16 mesh.tensor=1: makes 16 chips, the cluster has 8",
        ),  # too few hosts for it
        (["cluster.gcp.zones=[]"], "cluster.gcp.zones=[]: empty; give zones that have v5p"),
        (["cluster.gcp.zones=[moon]"], "cluster.gcp.zones=[moon]: must be names of zones, as in us-east5-a"),
        (["cluster.capacity=reserved"], "cluster.gcp.reservation=null: goes with cluster.capacity=reserved"),
        (["cluster.capacity=cheap"], "cluster.capacity=cheap: must be one of 'on-demand', 'spot', 'reserved'"),
        (["cluster.gcp.zone=x"], "cluster.gcp.zone: unknown key; did you mean cluster.gcp.zones"),
        (["cluster=local", "cluster.gcp.disk=x"], "cluster.gcp.disk: goes with cluster=gcp"),
        (
            ["cluster.gcp.startup_script=/nowhere", "cluster.gcp.endpoint=127.0.0.1:9"],
            "cluster.gcp.startup_script=/nowhere",
        ),
        ([], "cluster=gcp: no credentials; allowed: gcloud auth application-default login"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none"))
    process = launch("train", "cluster=gcp", f"run.root={tmp_path / 'runs'}", *overrides)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"train: {said}")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
