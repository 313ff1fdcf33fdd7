"""What a run's manifest says at its start: where the code and the packages stood."""

import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from orchestrator.config import Config
from orchestrator.rundir import Attempt, Manifest

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ray", "hydra-core", "wandb")


def git_commit() -> str | None:
    """The commit of this code, with '+' where the working tree differs; None outside a checkout."""
    top = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=top, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def new(config: Config, overrides: list[str]) -> Manifest:
    assert config.run.id is not None
    mesh = config.program.mesh
    return Manifest(
        id=config.run.id,
        created=time.time(),
        config=asdict(config),
        attempts=[Attempt("train", overrides, time.time())],
        git_commit=git_commit(),
        versions=versions(),
        mesh={"replica": mesh.replica, "fsdp": mesh.fsdp, "tensor": mesh.tensor},
        wandb_id=config.run.id,
        parent=None,
    )
