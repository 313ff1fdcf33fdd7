"""A run as a user starts it: what it leaves behind, and that the mesh, the hosts and the provider change nothing."""

import json
import math
from pathlib import Path

import pytest

from orchestrator.record import rundir
from tests import wandb_spool
from tests.runs import DEADLINE_S, SMALL, event_names, finish, goodput, launch, losses

STEPS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(root: Path) -> Path:
    """fsdp=8 over two simulated hosts."""
    overrides = [*SMALL, "profile.steps=[3,5]", "checkpoint.keep_last=1", "checkpoint.keep_every=20"]
    finish(launch("train", f"run.root={root}", "run.id=plain", *overrides), 0)
    return root / "plain"


def test_every_step_has_one_line_of_finite_metrics(plain: Path) -> None:
    rows = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {"loss", "grad_norm", "learning_rate", "tokens", "step_s", "tokens_per_s", "mfu", "param_norm", "attempt"}
    for row in rows:
        assert names <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert rows[-1]["tokens"] == STEPS * 8 * 128


def test_the_model_learns(plain: Path) -> None:
    seen = losses(plain)
    assert seen[STEPS] < seen[1] - 1.0


def test_events_tell_the_story_with_the_pids_of_both_hosts(plain: Path) -> None:
    names = event_names(plain)
    story = ["reserve", "start", "compile", "initialise", "first_step", "eval", "save", "commit", "finish"]
    assert [name for name in dict.fromkeys(names) if name in story] != []
    assert set(story) <= set(names)
    start = next(event for event in rundir.events(plain) if event["event"] == "start")
    assert len(set(start["pids"])) == 2


def test_kept_are_the_newest_checkpoints_and_each_mth(plain: Path) -> None:
    assert rundir.committed(plain) == [20, 40]


def test_goodput_buckets_sum_to_wall_time(plain: Path) -> None:
    found = goodput(plain)
    assert sum(found["buckets"].values()) == pytest.approx(found["wall_s"], rel=0.01)
    assert 0 < found["goodput"] < 1


def test_wandbs_own_record_holds_one_loss_a_step_and_the_held_out_loss(plain: Path) -> None:
    history = list(wandb_spool.history(plain))
    trained = {int(row["step"]): row["loss"] for row in history if "loss" in row}
    assert [int(row["step"]) for row in history if "loss" in row] == list(range(1, STEPS + 1))
    assert trained == pytest.approx(losses(plain))
    assert [int(row["step"]) for row in history if "eval/loss" in row] == [20, 40]


def test_profile_steps_write_a_trace(plain: Path) -> None:
    assert list(plain.glob("profile/**/*.xplane.pb"))


def test_manifest_names_everything_needed_to_go_on(plain: Path) -> None:
    manifest = rundir.read_manifest(plain)
    assert manifest.id == manifest.wandb_id == "plain"
    assert manifest.mesh == {"replica": 1, "fsdp": 8, "tensor": 1}
    assert manifest.config["train"]["steps"] == STEPS
    assert "train.steps=40" in manifest.attempts[0].overrides
    assert {"jax", "ray", "orbax-checkpoint"} <= manifest.versions.keys()


@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh.fsdp=4", "mesh.tensor=2"],
        pytest.param(["mesh.replica=2", "mesh.fsdp=4"], marks=pytest.mark.soak),
        ["cluster.slice=v5p-8", "mesh.fsdp=4"],  # one host
        pytest.param(["cluster.slice=v5p-32", "mesh.fsdp=8", "mesh.tensor=2"], marks=pytest.mark.soak),  # four hosts
        ["cluster.slice=v5p-8", "cluster.num_slices=2", "mesh=multislice"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_the_mesh_changes_no_loss(plain: Path, root: Path, overrides: list[str]) -> None:
    name = "mesh-" + str(abs(hash(tuple(overrides))))
    finish(launch("train", f"run.root={root}", f"run.id={name}", *SMALL, *overrides), 0)
    seen, expected = losses(root / name), losses(plain)
    assert seen.keys() == expected.keys()
    assert max(abs(seen[step] - expected[step]) for step in seen) <= 1e-4


def test_an_existing_ray_cluster_trains_the_same(plain: Path, root: Path, existing_cluster: str) -> None:
    overrides = ["cluster=ray", f"cluster.address={existing_cluster}", "train.dtype=float32"]
    finish(launch("train", f"run.root={root}", "run.id=existing", *SMALL, *overrides), 0)
    assert losses(root / "existing") == losses(plain)


def test_a_fault_found_while_tokenising_is_one_line_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep.jsonl"
    good = json.dumps({"text": "x" * 1000})
    deep.write_text("\n".join([good] * 2000 + ["{broken"]))
    process = launch("train", f"run.root={root}", "run.id=deep", "data=text", f"data.path={deep}", *SMALL)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert [line for line in err.splitlines() if line.startswith("train:")] == [err.splitlines()[-1]]
    assert "deep.jsonl:2001" in err
    assert "Traceback" not in err
    assert not (root / "deep").exists()
