"""What a run's manifest says at its start: where the code and the packages stood."""

import sys
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

from orchestrator.config import Config
from orchestrator.record.rundir import Attempt, Manifest
from orchestrator.record.source import source

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ray", "hydra-core", "wandb")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def new(config: Config, overrides: list[str], command: str = "train", parent: dict[str, Any] | None = None) -> Manifest:
    """Of a run that begins. parent: the id and step of the run whose weights it takes."""
    assert config.run.id is not None
    mesh, code = config.program.mesh, source()
    return Manifest(
        id=config.run.id,
        created=time.time(),
        config=asdict(config),
        attempts=[Attempt(command, overrides, time.time(), code.commit)],
        git_commit=code.commit,
        git_diff=code.diff,
        versions=versions(),
        mesh={"replica": mesh.replica, "fsdp": mesh.fsdp, "tensor": mesh.tensor},
        wandb_id=config.run.id,
        parent=parent,
    )
