"""launch.train cluster=gke against the emulator, whose pods are Ray nodes on this machine."""

import time
from pathlib import Path

import pytest

from orchestrator.record import rundir
from orchestrator.slices.simulated.reaper import kill_groups
from tests import kuberay
from tests.kube import Settings, preempt
from tests.runs import (
    RUN,
    STEPS,
    assert_same_run,
    finish,
    launch,
    losses,
    orphaned_folders,
    wait_for,
    wait_for_step,
)


def failures(folder: Path) -> list[str]:
    return [event["outcome"] for event in rundir.events(folder) if event["event"] == "failure"]


def test_a_container_killed_and_a_preemption_end_bitwise_like_an_undisturbed_run(
    tmp_path: Path, undisturbed: Path
) -> None:
    before = orphaned_folders()
    folder = tmp_path / "kube"
    with kuberay.serve(Settings(notice_s=30.0)) as emulated:
        where = [*kuberay.overrides(emulated), "cluster.slice=v5p-16", f"run.root={tmp_path}", f"run.id={folder.name}"]
        process = launch("train", *where, *RUN)
        wait_for_step(process, folder, 8)
        with emulated.lock:
            (name,) = emulated.made
            kill_groups({emulated.made[name].slices[0][1].process.pid})
        wait_for(lambda: failures(folder) != [], "the loss of a host to be seen", process)
        wait_for_step(process, folder, 20)
        with emulated.lock:
            preempt(emulated, emulated.made[name])
        wait_for(lambda: len(failures(folder)) > 1, "it to move on", process)
        with emulated.lock:
            emulated.made[name].taken_at[0] = time.monotonic()  # no need to wait for the rest of the notice
        finish(process, 0)
        assert emulated.made == {}
        assert [line.split(maxsplit=1)[1] for line in emulated.log].count(f"{name} slice 0 has its nodes") == 2
    assert failures(folder)[1:] == ["preempted"]
    assert_same_run(undisturbed, folder, STEPS)
    (code,) = (folder / "code").iterdir()
    assert list((code / "gemma").glob("train/__pycache__/trainer.*"))  # the hosts ran what they were given
    assert orphaned_folders() <= before


@pytest.mark.parametrize(
    ("settings", "override", "said"),
    [
        (Settings(quota="pods", hosts=False), "timeout.reserve_s=60", "exceeded quota: tpus"),
        (Settings(free=0, hosts=False), "timeout.reserve_s=2", "no Ray head within timeout.reserve_s=2"),
    ],
)
def test_what_is_not_given_ends_the_run_with_2_and_nothing_left(
    tmp_path: Path, settings: Settings, override: str, said: str
) -> None:
    with kuberay.serve(settings) as emulated:
        process = launch(
            "train",
            *kuberay.overrides(emulated),
            f"run.root={tmp_path}",
            "run.id=poor",
            override,
            "train.dtype=float32",
        )
        out, err = process.communicate(timeout=100)
        assert process.returncode == 2
        assert (out + err).count("gave up: ") == 1
        assert said in out + err
        assert emulated.made == {}
    assert losses(tmp_path / "poor") == {}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.slice=v5p-17", "cluster.slice=v5p-17: no such slice; allowed: v5p-8, v5p-16"),
        ("cluster.gke.mount=/shared", "run.root=RUNS: the hosts see cluster.gke.claim=emulated at cluster.gke.mount="),
        ("cluster.gke.kubeconfig=/none", "cluster=gke cluster.gke.kubeconfig=/none cluster.gke.context=null: no cred"),
        (
            "cluster.gke.namespace=default",
            "cluster=gke: 404 Not Found: Not Found; is there a Ray operator on this cluster",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_made(tmp_path: Path, override: str, said: str) -> None:
    with kuberay.serve(Settings(missing="operator", hosts=False)) as emulated:
        process = launch("train", *kuberay.overrides(emulated), f"run.root={tmp_path / 'runs'}", override)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("train: " + said.replace("RUNS", str(tmp_path / "runs")))
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
