"""What launch.evaluate and launch.serve have in common: weights that are named, and a run of its own that uses them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gemma.config import ConfigError, naming
from launch.command import CONF, arguments, process_started
from orchestrator import config as configs
from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.interrupt import Interrupt
from orchestrator.plan import preflight
from orchestrator.record import manifest, rundir


def given(usage: str) -> tuple[dict[str, str], list[str]]:
    """run=, weights=, step= and run.root= of the command line, and the overrides. Raises ConfigError."""
    own, overrides = arguments({"run": "", "weights": "", "step": "", "run.root": "runs"}, usage)
    if bool(own["run"]) == bool(own["weights"]):
        raise ConfigError("run, weights: give one of them: run=ID, run=latest or weights=FOLDER")
    if own["step"] and not own["step"].isdecimal():
        raise ConfigError(f"step={own['step']}: must be a whole number")
    return own, overrides


def begin(config: Config, overrides: list[str], command: str, parent: dict[str, Any] | None) -> Exit:
    """A run of its own. parent: the id and step of the run whose weights it uses."""
    preflight.check(config)
    preflight.check_fits(config)
    run_id = config.run.id or rundir.new_id(f"{config.model.name}-{command}")
    config = configs.with_id(config, run_id, config.run.root)
    with Interrupt() as interrupt:
        folder = rundir.create(config.run.root, run_id)
        lock = rundir.lock(folder)
        rundir.write_manifest(folder, manifest.new(config, overrides, command, parent))

        from orchestrator.run import run  # Ray: not before the input is known to be good

        return run(config, folder, lock, interrupt, process_started())


def named_run(own: Mapping[str, str]) -> tuple[Path, int, dict[str, Any]]:
    """The folder, the step and the config of run=ID|latest. Raises ConfigError where it has no weights of its own."""
    folder = rundir.find(own["run.root"], own["run"]) if own["run"] != "latest" else newest_trained(own["run.root"])
    found = rundir.read_manifest(folder).config
    if not has_weights(found):
        raise ConfigError(f"run={folder.name}: has no weights of its own; give the run that trained them")
    return folder, chosen(folder, own["step"]), found


def named_folder(own: Mapping[str, str]) -> tuple[Path, int | None]:
    """The folder of weights=FOLDER, and its step where it is a run's. Raises ConfigError."""
    with naming(f"weights={own['weights']}"):
        folder = Path(own["weights"]).expanduser().absolute()
        if not folder.is_dir():
            raise ConfigError(f"weights={own['weights']}: no such folder")
        step = chosen(folder, own["step"]) if (folder / "checkpoints").is_dir() else None
    if own["step"] and step is None:
        raise ConfigError(f"step={own['step']}: weights={own['weights']} is not a run, and has no steps")
    return folder, step


def defaults(overrides: list[str], of: str = "run") -> dict[str, Any]:
    """of: a file of conf/."""
    with initialize_config_dir(CONF, version_base="1.3"):
        container = OmegaConf.to_container(compose(of, overrides), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def newest_trained(root: str) -> Path:
    """The newest run that is no evaluation. Raises ConfigError where there is none."""
    known = [folder for folder in rundir.runs(root) if has_weights(rundir.read_manifest(folder).config)]
    if not known:
        raise ConfigError(f"run=latest: no runs in run.root={root}")
    return known[-1]


def has_weights(config: Mapping[str, Any]) -> bool:
    """Whether a run trains: it neither evaluates nor serves what others have trained."""
    return not config.get("evaluate") and not config.get("serve")


def chosen(folder: Path, step: str) -> int:
    """The step to evaluate: of the run's checkpoints, the newest where none is given. Raises ConfigError."""
    committed = rundir.committed(folder)
    if not committed:
        raise ConfigError(f"run={folder.name}: has no checkpoint yet")
    if step and int(step) not in committed:
        raise ConfigError(f"step={step}: run {folder.name} has no such checkpoint; allowed: {committed}")
    return int(step or committed[-1])
