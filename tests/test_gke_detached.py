"""A detached run of cluster=gke: its controller is a job on the head of a RayCluster that outlives it."""

from pathlib import Path

from orchestrator.record import source
from tests import kube, kuberay
from tests.test_detached import DEADLINE_S, RUN, launch, newest


def test_a_run_is_driven_from_the_head_of_a_kept_raycluster_and_leaves_it(tmp_path: Path) -> None:
    from orchestrator import jobs

    with kuberay.serve(kube.Settings(dashboard=True)) as emulated:
        where = [*kuberay.overrides(emulated), "cluster.name=mine", "cluster.slice=v5p-8"]
        up = launch(tmp_path, source.TOP, "cluster", "up", *where)
        assert up.returncode == 0, up.stderr
        (made,) = emulated.made.values()
        assert made.head is not None
        where += [f"cluster.address={made.head.ip}:{made.head.port}"]
        run = ["detach=true", f"run.root={tmp_path / 'there'}", "run.id=away", *RUN, "train.steps=3"]
        done = launch(tmp_path, source.TOP, "train", *where, *run)
        assert done.returncode == 0, done.stderr
        head = jobs.connect(f"{made.head.ip}:8265")
        job = jobs.find(head, "away")
        assert jobs.wait(head, job.id, DEADLINE_S)
        assert jobs.find(head, "away").state == "finished", jobs.output(head, job.id)
        assert newest(tmp_path / "there/away") == 3
        assert len(emulated.made) == 1
        down = launch(tmp_path, source.TOP, "cluster", "down", *where)
        assert (down.returncode, emulated.made) == (0, {})
