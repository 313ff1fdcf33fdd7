"""A path is one of the file system: a URL, or a user who does not exist, is refused in one line; nothing is made."""

import subprocess
import sys
from pathlib import Path

import pytest

from gemma.config import ConfigError
from launch import command, fork
from tests.test_config import config_of

TOP = Path(__file__).parents[1]
WRONG = {
    "gs://bucket/x": "is a URL",
    "s3://bucket": "is a URL",
    "gs:/bucket/x": "is a URL",
    "file:///tmp/x": "is a URL",
    "~nouser/x": "no such user",
}
QUOTED = {path: f"'{path}'" for path in WRONG}


@pytest.mark.parametrize("path", WRONG)
@pytest.mark.parametrize("key", ["run.root", "run.cache", "data.path", "data.tokenizer", "train.init_from"])
def test_the_configuration_refuses_it(key: str, path: str) -> None:
    more = ["data=text"] if key == "data.path" else []
    with pytest.raises(ConfigError, match=f"{key}={path}: .*{WRONG[path]}"):
        config_of(*more, f"{key}={QUOTED[path]}")


def test_an_eval_set_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="eval.sets.more=gs://b: is a URL"):
        config_of("eval.sets={more: 'gs://b'}")


@pytest.mark.parametrize("path", WRONG)
@pytest.mark.parametrize("key", sorted(command.PATHS))
def test_every_command_s_own_paths_are_refused(monkeypatch: pytest.MonkeyPatch, key: str, path: str) -> None:
    monkeypatch.setattr(sys, "argv", ["x", f"{key}={path}"])
    with pytest.raises(ConfigError, match=f"{key}={path}: .*{WRONG[path]}"):
        command.arguments({key: ""}, "")


@pytest.mark.parametrize("path", WRONG)
def test_a_fork_refuses_it(path: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[path]):
        fork.fork([f"from={path}@3"], 0.0)
    with pytest.raises(ConfigError, match=WRONG[path]):
        fork.fork(["from=some@3", f"run.root={path}"], 0.0)


@pytest.mark.parametrize("path", ["/data/a:b/c", "./x", "~/x", "a=b", "C"])
def test_other_paths_are_taken(path: str) -> None:
    assert config_of(f"run.root='{path}'").run.root == path


def test_nothing_is_made(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "launch.train", "run.root=gs://bucket/runs"]
    done = subprocess.run(line, cwd=tmp_path, env={"PYTHONPATH": str(TOP)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "mount the bucket" in done.stderr
    assert not list(tmp_path.iterdir())
