"""Runs that outlive the machine they were submitted from: jobs on the head of a Ray cluster with TPU nodes."""

import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma.config import ConfigError
from orchestrator.plan import preflight
from orchestrator.record import rundir, source
from tests import cloud_tpu, existing_cluster, metadata_server
from tests.cloud import Settings
from tests.runs import event_names
from tests.test_source import git

DEADLINE_S = 120.0
RUN = [
    "train.steps=100000",
    "optim.warmup_steps=2",
    "checkpoint.every=0",
    "eval.every=0",
    "train.dtype=float32",
    "wandb.mode=disabled",
]


@dataclass(frozen=True)
class Place:
    """Where the tests stand."""

    address: str
    dashboard: str
    checkout: Path  # that runs are submitted from
    away: Path  # another machine's folder, as it were
    root: Path  # on the cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    top = tmp_path_factory.mktemp("detached")
    checkout = top / "checkout"
    for name in source.files():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.TOP / name, checkout / name)
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "all")
    (top / "away").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with existing_cluster.cluster("1", "", str(port)) as address:
        yield Place(address, f"127.0.0.1:{port}", checkout, top / "away", top / "cluster/runs")


def launch(at: Path, code: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a user gives it, standing in a folder, with the code of a checkout."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *arguments],
        cwd=at,
        env={"PYTHONPATH": str(code), "PATH": "/usr/bin:/bin", "RAY_ADDRESS": "127.0.0.1:1"},  # of another cluster
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    print(f"{time.monotonic() - started:.1f} s: {command} {done.returncode} {done.stdout} {done.stderr}")
    return done


def wait_for(ready: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}"
        time.sleep(0.05)


def newest(folder: Path) -> int:
    return max(rundir.metrics(folder), default=0)


def test_a_run_outlives_who_submitted_it_and_is_watched_stopped_and_resumed_from_elsewhere(place: Place) -> None:
    from orchestrator import jobs

    folder, cluster = place.root / "away", f"cluster.dashboard={place.dashboard}"
    (place.checkout / "orchestrator/page/page.py").open("a").write("# a change\n")
    (place.checkout / "orchestrator/fresh.py").write_text("# a new file\n")
    commit = git(place.checkout, "rev-parse", "HEAD")
    where = ["cluster=ray", f"cluster.address={place.address}", cluster, "detach=true", f"run.root={place.root}"]
    done = launch(place.checkout, place.checkout, "train", *where, "run.id=away", *RUN)
    assert done.returncode == 0, done.stderr
    assert f"run away: on the head of {place.dashboard}, in {folder}" in done.stdout

    # What is changed after the submission does not run.
    for name in ("gemma/train/step.py", "gemma/train/trainer.py", "orchestrator/hosts/group.py"):
        (place.checkout / name).write_text("raise SystemExit('not the code that was submitted')\n")
    wait_for(lambda: newest(folder) >= 3, "step 3")
    git(place.checkout, "checkout", "-q", "--", ".")
    manifest = rundir.read_manifest(folder)
    assert manifest.git_commit == commit + "+"
    assert manifest.git_diff is not None
    assert "+# a change" in manifest.git_diff
    assert "+# a new file" in manifest.git_diff
    assert not manifest.config["detach"]

    head = jobs.connect(place.dashboard)
    assert head.client.get_job_info(jobs.find(head, "away").id).driver_node_id == head.node_id

    # From elsewhere, by nothing but the cluster; and from here, by nothing but the run.
    listed = launch(place.away, source.TOP, "status", cluster)
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [["run", "state"], ["away", "running"]]
    told = launch(place.away, source.TOP, "status", cluster, "run=away")
    assert told.returncode == 0
    assert [line for line in told.stdout.splitlines() if line.startswith("away ") and "running" in line]
    assert "last events:" in told.stdout
    refused = launch(place.checkout, source.TOP, "report", "run=away")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"run=away: lies on the cluster of {place.dashboard}, in {place.root}" in refused.stderr
    down = ["cluster", "down", "run=away", "cluster=gcp", "cluster.gcp.endpoint=127.0.0.1:9"]
    refused = launch(place.checkout, source.TOP, *down)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "run=away: is being driven by a job on a cluster" in refused.stderr
    hosts = launch(place.checkout, source.TOP, "logs", "run=away", "host=1")
    assert (hosts.returncode, hosts.stdout.splitlines()[:1]) == (0, ["==> logs/attempt-1-host-1.log <=="])

    stopped = launch(place.away, source.TOP, "stop", cluster, "run=away")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert f"run away: stopped, at step {newest(folder)}" in stopped.stdout
    assert_saved(folder)
    logs = launch(place.away, source.TOP, "logs", cluster, "run=away")
    assert "run away: stopped, resumable" in logs.stdout
    assert "Running entrypoint" not in logs.stdout
    again = launch(place.checkout, source.TOP, "stop", "run=away")
    assert (again.returncode, again.stdout) == (0, "run away: is not running (stopped, resumable)\n")

    steps = newest(folder) + 2
    done = launch(place.checkout, place.checkout, "resume", "run=away", "detach=true", f"train.steps={steps}")
    assert done.returncode == 0, done.stderr
    followed = launch(place.away, source.TOP, "logs", cluster, "run=away", "follow=true")
    assert (followed.returncode, followed.stdout.count("run away: finished")) == (0, 1)
    assert sorted(rundir.metrics(folder)) == list(range(1, steps + 1))
    again = launch(place.away, source.TOP, "status", cluster)
    assert again.stdout.splitlines()[1].split()[:2] == ["away", "finished"]


def assert_saved(folder: Path) -> None:
    """It ended as one that is resumed where it stopped."""
    wait_for(lambda: not rundir.is_locked(folder), "the controller to be gone")
    assert [name for name in event_names(folder) if name != "provider"][-1] == "stop"
    assert rundir.committed(folder)[-1] == newest(folder)
    assert not list((folder / "logs").glob("*failure*"))


def test_a_detached_controller_asks_for_slices_by_itself_and_saves_and_gives_back_when_ray_stops_it(
    place: Place,
) -> None:
    from orchestrator import jobs

    folder = place.root / "cloud"
    with cloud_tpu.serve(Settings(provision_s=0.5)) as emulated:
        where = ["cluster=gcp", f"cluster.address={place.address}", f"cluster.dashboard={place.dashboard}"]
        where += [f"cluster.gcp.endpoint={emulated.endpoint}", "cluster.gcp.poll_s=0.2", "cluster.slice=v5p-8"]
        where += ["detach=true", f"run.root={place.root}", f"run.id={folder.name}"]
        done = launch(place.away, source.TOP, "train", *where, *RUN)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: newest(folder) >= 3, "step 3")
        head = jobs.connect(place.dashboard)
        job = jobs.find(head, "cloud")
        jobs.stop(head, job.id)  # as `ray job stop` does
        assert jobs.wait(head, job.id, DEADLINE_S)
        assert jobs.find(head, "cloud").state == "stopped"
        assert emulated.given == {}
        assert len(emulated.active_at) == 1
    assert_saved(folder)


def test_what_the_head_refuses_is_told_in_one_line_and_leaves_nothing(place: Place) -> None:
    from orchestrator import jobs

    where = ["cluster=ray", "cluster.address=127.0.0.1:9", f"cluster.dashboard={place.dashboard}", "detach=true"]
    done = launch(place.away, source.TOP, "train", *where, f"run.root={place.root}", "run.id=refused", *RUN)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("train: cluster.address=127.0.0.1:9: nothing answers there")
    assert not (place.root / "refused").exists()
    assert not (place.away / "runs/refused").exists()
    assert "refused" not in [job.run for job in jobs.jobs(jobs.connect(place.dashboard))]
    unknown = launch(place.away, source.TOP, "logs", f"cluster.dashboard={place.dashboard}", "run=nosuch")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("logs: run=nosuch: no such run is known to the Ray cluster at")


def test_a_job_is_bound_to_the_head_whatever_ray_is_told_and_its_arguments_reach_it_whole() -> None:
    from orchestrator import jobs

    given: dict[str, Any] = {}

    class Client:
        def submit_job(self, **wanted: Any) -> str:
            given.update(wanted)
            return str(wanted["submission_id"])

    head = jobs.Head("head:1", Client(), "the-node", {}, {})  # type: ignore[arg-type]
    assert jobs.submit(head, "some", "/r", "train", ["profile.steps=[1,2]", "data.path=/a b"]).startswith("some-train-")
    assert given["entrypoint_label_selector"] == {"ray.io/node-id": "the-node"}
    assert shlex.split(given["entrypoint"])[-4:] == ["-m", "launch.train", "profile.steps=[1,2]", "data.path=/a b"]


def test_with_detach_nothing_is_compiled_here(tmp_path: Path) -> None:
    """So that what does not fit is the head's to say, and here only that there is none."""
    run = ["detach=true", "cluster=ray", "cluster.address=127.0.0.1:9", "cluster.slice=v5p-8", "run.root=/r"]
    done = launch(tmp_path, source.TOP, "train", *run, "model=gemma2_27b", f"run.cache={tmp_path}/cache")
    assert done.returncode == 1
    assert done.stderr.startswith("train: cluster.dashboard=127.0.0.1:8265: no dashboard of a Ray cluster answers")


def test_a_machine_that_may_be_taken_away_drives_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import jobs

    def head(resources: dict[str, float], labels: dict[str, str]) -> jobs.Head:
        return jobs.Head("head:1", None, "n", resources, labels)  # type: ignore[arg-type]

    jobs.check_stays(head({"CPU": 4.0}, {"ray.io/market-type": "on-demand"}))
    tpu = {"ray.io/tpu-slice-name": "s0"}
    for resources, labels, why in (
        ({"TPU": 4.0}, tpu, "is a TPU host, of slice s0"),
        ({}, tpu, "is a TPU host, of slice s0"),
        ({}, {"ray.io/market-type": "spot"}, "is a spot machine"),
    ):
        with pytest.raises(ConfigError, match=f"^cluster.dashboard=head:1: the head {why}"):
            jobs.check_stays(head(resources, labels))
    with metadata_server.serve() as machine:
        monkeypatch.setenv("GCE_METADATA_HOST", machine.host)
        for said in (None, "FALSE"):
            machine.says |= {"instance/scheduling/preemptible": said} if said else {}
            preflight.check_stays()
        machine.says["instance/scheduling/preemptible"] = "TRUE"
        with pytest.raises(ConfigError, match="^detach=true: the head of the Ray cluster is a preemptible machine"):
            preflight.check_stays()
