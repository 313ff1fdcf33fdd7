"""What a user gets wrong, through the real commands: one line that names the key, exit code 1, nothing left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_rundir import fabricate

TOP = Path(__file__).parents[1]
DEADLINE_S = 10.0  # seen: about 1 s on an idle machine
FORMER = "former"  # a run of 10 steps, all done


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory to stand in, with bad files and a finished run in it."""
    (tmp_path / "emptydir").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short for a batch")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "tokenizer.model").write_text("no SentencePiece model")
    (tmp_path / "afile").touch()
    fabricate(tmp_path / "runs", FORMER, "train.steps=10", "optim.warmup_steps=2", done=10)
    return tmp_path


def launch(place: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(TOP)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *arguments],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    took_s = time.monotonic() - started
    print(f"{took_s:.2f} s: {command} {' '.join(arguments)}")
    assert took_s < DEADLINE_S
    return done


def everything(place: Path) -> dict[str, bytes | None]:
    """Every path below, and what it holds; a lock that is free says nothing."""
    found = {str(p): p.read_bytes() if p.is_file() else None for p in place.rglob("*")}
    return {path: held for path, held in found.items() if not path.endswith(".lock")}


def refused(place: Path, command: str, arguments: str, expected: str) -> None:
    before = everything(place)
    done = launch(place, command, *arguments.split())
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert [line for line in lines if expected in line], done.stderr
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert everything(place) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train.stepz=3", "train.stepz: unknown key; did you mean train.steps"),
        ("+train.stepz=3", "train.stepz: unknown key"),
        ("nonsense=3", "nonsense: unknown key; sections are run, model"),
        ("train.dtype=bfloat16", "train.dtype=bfloat16: XLA aborts on CPUs"),
        ("train.steps=many", "train.steps=many: must be a whole number"),
        ("train.steps=1,2", "train.steps=1,2"),
        ("model=huge", "model=huge: no such choice; allowed: gemma2_27b, gemma2_2b, gemma2_9b, tiny\n"),
        ("data=null", "data"),
        ("train.steps", "train.steps: not an override; allowed is key=value"),
        ("train.steps=[1", "train.steps=[1: not an override"),
        ("train.steps=${nothing}", "train.steps"),
        ("--frob", "--frob"),
        ("--cfg jobs", "--cfg"),
        ("mesh.fsdp=3", "mesh.fsdp=3"),
        ("train.batch=9", "train.batch=9"),
        ("data=text", "data.path: missing"),
        ("data=text data.path=nowhere", "data.path=nowhere: no such file"),
        ("data=text data.path=emptydir", "data.path=emptydir: no text in this directory"),
        ("data=text data.path=empty.txt", "data.path=empty.txt"),
        ("data=text data.path=short.txt", "data.path=short.txt: 21 bytes of text are less than one batch"),
        ("data=text data.path=broken.jsonl", "data.path: broken.jsonl:2 is not JSON"),
        ("data.tokenizer=nowhere.model", "data.tokenizer=nowhere.model: no such file"),
        ("data.tokenizer=tokenizer.model", "data.tokenizer=tokenizer.model: not a SentencePiece model"),
        ("run.root=afile", "run.root=afile"),
        ("run.root=afile/below", "run.root=afile/below"),
        (f"run.id={FORMER}", f"run.id={FORMER}: exists in runs; go on with launch.resume run={FORMER}"),
        ("run.id=../escape", "run.id=../escape: letters"),
        ("cluster.slice=v5p-17", "cluster.slice=v5p-17: no such slice"),
        ("cluster=ray", "cluster.address: missing"),
        ("model=gemma2_27b", "model=gemma2_27b: on cluster=local, 2 simulated hosts need about 436 GB"),
        ("model.width=400000000", "model=tiny: on cluster=local"),
        (
            "cluster.slice=v5p-1024 mesh.fsdp=64 mesh.tensor=2 mesh.replica=4 train.batch=256",
            "cluster.num_slices=1: 128 hosts",
        ),
        ("run.cache=afile", "run.cache=afile"),
        ("run.root=", "run.root=: empty"),
        (f"run.root={'long' * 99}", "File name too long"),
        ("hydra.run.dir=/proc/x", "/proc/x"),
        ("--multirun=1", "--multirun=1: unknown flag"),
        ("profile.steps=[500,600]", "profile.steps=[500, 600]: begins after train.steps=400"),
        ("wandb.mode=foo", "wandb.mode=foo: must be one of"),
        ("detach=true run.root=/r", "detach=true: a slice of cluster=local ends with this machine; allowed are"),
        ("detach=true run.root=/r cluster=gcp", "detach=true: cluster=gcp starts the Ray head on this machine; give"),
        (
            "detach=true run.root=/r cluster=gke cluster.gke.image=x",
            "detach=true: with cluster=gke the controller lives",
        ),
        ("detach=true cluster=ray cluster.address=127.0.0.1:9", "run.root=runs: with detach=true it lies on the"),
        (
            "detach=true run.root=/r cluster=ray cluster.address=auto",
            "cluster.address=auto: detach=true needs HOST:PORT, or cluster.dashboard=HOST:PORT",
        ),
        (
            "detach=true run.root=/r cluster=ray cluster.address=auto cluster.dashboard=127.0.0.1:9",
            "cluster.dashboard=127.0.0.1:9: no dashboard of a Ray cluster answers there",
        ),
        ("cluster.dashboard=http://x", "cluster.dashboard=http://x: must be HOST:PORT, or null"),
    ],
)
def test_train_refuses_in_one_line(place: Path, arguments: str, expected: str) -> None:
    refused(place, "train", arguments, expected.removesuffix("\n"))
    if expected.endswith("\n"):  # the message ends there, with nothing of Hydra's behind it
        assert launch(place, "train", *arguments.split()).stderr.endswith(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "run: missing"),
        ("run=unknown", "run=unknown: no such run in run.root=runs; the newest are former"),
        ("run=latest run.root=emptydir", "run=latest: no runs in run.root=emptydir"),
        (f"run={FORMER}", "train.steps=10: run former has done 10 already; allowed: more than 10"),
        (f"run={FORMER} train.steps=5", "train.steps=5: run former has done 10 already"),
        (f"run={FORMER} train.steps=0", "train.steps=0: must be at least 1"),
        (f"run={FORMER} train.steps=20 model.width=128", "model.width=128: a resumed run keeps model.width=64"),
        (f"run={FORMER} train.steps=20 model=gemma2_2b", "a resumed run keeps model."),
        (f"run={FORMER} train.steps=20 run.id=other", "run.id=other: a resumed run keeps run.id=former"),
        (f"run={FORMER} train.steps=20 train.seed=1", "train.seed=1: changes the data order (was 0)"),
        (f"run={FORMER} train.steps=20 train.batch=16", "train.batch=16: changes the data order (was 8)"),
        (f"run={FORMER} train.steps=20 train.stepz=1", "train.stepz: unknown key; did you mean train.steps"),
        (f"run={FORMER} train.steps=many", "train.steps=many: must be a whole number"),
        (f"run={FORMER} train.steps=20 mesh.fsdp=3", "mesh.fsdp=3"),
        (f"run={FORMER} train.steps=20 mesh=huge", "mesh=huge: no such choice; allowed: fsdp, multislice"),
        (f"run={FORMER} train.steps=20 wandb.mode=foo", "wandb.mode=foo: must be one of"),
        (f"run={FORMER} train.steps=20 +train.foo=1", "+train.foo=1: a resumed run takes key=value only"),
        (f"run={FORMER} train.steps=20,30", "train.steps=20,30"),
        (f"run={FORMER} train=foo", "train=foo: train is a section; allowed is train.NAME=value"),
        (f"run={FORMER} optim={{lr:3}}", "optim={lr:3}: optim is a section"),
        (f"run={FORMER} train.steps", "train.steps: not an override"),
        (f"run={FORMER} --frob", "--frob: not an override"),
    ],
)
def test_resume_refuses_in_one_line(place: Path, arguments: str, expected: str) -> None:
    refused(place, "resume", arguments, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("run=unknown", "run=unknown: no such run"),
        ("train.steps=3", "train.steps: unknown key; allowed: run, run.root"),
        ("--frob", "--frob: not an override"),
        ("cluster.address=auto", "cluster.address=auto: must be HOST:PORT"),
    ],
)
def test_status_refuses_in_one_line(place: Path, arguments: str, expected: str) -> None:
    refused(place, "status", arguments, expected)


def test_a_run_without_a_checkpoint_that_was_lost_is_not_started_afresh_by_a_bad_manifest(place: Path) -> None:
    (place / "runs" / FORMER / "manifest.json").write_text('{"id": "former"')
    refused(place, "resume", f"run={FORMER}", "run=former: ")


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("train", "--help", "tiny"),
        ("train", "--cfg job", "batch: 8"),
        ("train", "train.steps=77 --cfg job", "steps: 77"),
        ("resume", "--help", "python -m launch.resume run=latest"),
        ("status", "--help", "python -m launch.status"),
        ("status", "", "former"),
        ("status", "run=former", "checkpoints at steps [10]"),
        ("status", "run.root=emptydir", "no runs in emptydir"),
    ],
)
def test_a_question_is_answered_with_exit_code_0(place: Path, command: str, arguments: str, expected: str) -> None:
    before = everything(place)
    done = launch(place, command, *arguments.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout
    assert everything(place) == before
