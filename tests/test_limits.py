"""What can mean nothing is refused by its name; a sweep goes on past a refused job; a reader who leaves is no fault."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemma.config import ConfigError
from launch.command import checked
from orchestrator.config import with_id
from orchestrator.record.report import resume_command
from tests.test_config import config_of

TOP = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("chaos.faults=[worker@999999]", "below train.steps=400"),
        ("chaos.faults=[worker@400]", "below train.steps=400"),
        ("chaos.faults=[worker@3/9]", "hosts 0 to 1"),
        ("optim.lr=1e300", "at most 10"),
        ("optim.warmup_steps=12345678901234567890", r"below 2\*\*32"),
        ("eval.every=12345678901234567890", r"below 2\*\*32"),
        ("eval.rows=99999999999", r"below 2\*\*32"),
        ("train.loss_chunk=12345678901234567890", r"below 2\*\*32"),
        ("checkpoint.snapshot=12345678901234567890", r"below 2\*\*32"),
        ("profile.steps=[1,12345678901234567890]", r"below 2\*\*32"),
        ("wandb.project=a/b", "='a/b': letters"),
        (f"wandb.project={'x' * 500}", "at most 128"),
        ('wandb.project="a\\nb"', "letters"),
        ("wandb.entity=a/b", "='a/b': letters"),
    ],
)
def test_it_is_refused_by_its_key(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}.*{said}"):
        config_of(*(["chaos=listed"] if override.startswith("chaos") else []), override)


@pytest.mark.parametrize("argument", ["hydra.output_subdir=x", "+hydra.run.dir=y", "hydra.job.chdir=true"])
def test_hydra_makes_no_files(argument: str) -> None:
    with pytest.raises(ConfigError, match="Hydra's own files are off"):
        checked([argument])


def launched(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=cwd, env={"PYTHONPATH": str(TOP)}, capture_output=True, text=True, timeout=60)


def test_a_sweep_goes_on_past_a_refused_job(tmp_path: Path) -> None:
    done = launched(tmp_path, "launch.train", "-m", "train.batch=7,9", "cluster=local")
    assert done.returncode == 1
    assert "train.batch=7" in done.stderr
    assert "train.batch=9" in done.stderr
    assert done.stderr.count("refused, the others go on") == 2
    assert not list(tmp_path.iterdir())


def test_a_search_is_launch_plan_s(tmp_path: Path) -> None:
    done = launched(tmp_path, "launch.train", "plan.search=true")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "only launch.plan" in done.stderr


@pytest.mark.parametrize("command", ["status", "train", "plan", "resume", "convert", "evaluate"])
def test_a_reader_who_leaves_is_no_fault(tmp_path: Path, command: str) -> None:
    more = [] if command == "status" else ["--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *more],
        cwd=tmp_path,
        env={"PYTHONPATH": str(TOP)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("root", ["a b", "it's", "$HOME", "a;b", "runs2"])
def test_the_printed_resume_line_can_be_pasted(tmp_path: Path, root: str) -> None:
    line = shlex.split(resume_command(with_id(config_of(), "some", root), tmp_path / "some"))
    assert line[3:] == ["run=some", f"run.root={root}"]
