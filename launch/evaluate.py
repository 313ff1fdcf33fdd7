"""python -m launch.evaluate run=ID|latest|weights=FOLDER [key=value ...]: held-out loss of a checkpoint or weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gemma.config import ConfigError, naming
from launch.command import CONF, apply, arguments, main, process_started
from orchestrator import config as configs
from orchestrator.config import Config
from orchestrator.interrupt import Interrupt
from orchestrator.plan import preflight
from orchestrator.record import manifest, rundir

USAGE = """Held-out loss of a run's checkpoint, or of weights, on the same slices and by the same program as in
training.

  python -m launch.evaluate run=latest                          the newest checkpoint, on the run's held-out text
  python -m launch.evaluate run=ID step=400 data=text data.path=DIR
  python -m launch.evaluate weights=gemma-2-2b model=gemma2_2b data=text data.path=DIR data.tokenizer=MODEL

  run, weights   what is evaluated: a run (its model, data, mesh and slices are taken unless overridden), or a folder of
                 launch.convert's or Hugging Face's
  step           of a run's checkpoints (default: the newest)
  run.root       where runs lie, and where the evaluation's own directory is made (default: runs)

An evaluation is a run of its own, with an id that launch.status, report, logs, stop and resume take. Any other override
of launch.train is one here; of train, only batch, dtype, accumulation and remat matter."""


def work() -> int:
    own, overrides = arguments({"run": "", "weights": "", "step": "", "run.root": "runs"}, USAGE)
    if bool(own["run"]) == bool(own["weights"]):
        raise ConfigError("run, weights: give one of them: run=ID, run=latest or weights=FOLDER")
    if own["step"] and not own["step"].isdecimal():
        raise ConfigError(f"step={own['step']}: must be a whole number")
    config, parent = of_run(own, overrides) if own["run"] else of_weights(own, overrides)
    preflight.check(config)
    run_id = config.run.id or rundir.new_id(f"{config.model.name}-evaluate")
    config = configs.with_id(config, run_id, config.run.root)
    with Interrupt() as interrupt:
        folder = rundir.create(config.run.root, run_id)
        lock = rundir.lock(folder)
        rundir.write_manifest(folder, manifest.new(config, overrides, "evaluate", parent))

        from orchestrator.run import run  # Ray: not before the input is known to be good

        return run(config, folder, lock, interrupt, process_started())


def of_run(own: dict[str, str], overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """A run's own config, but for what concerns its evaluation; and the run's id and step."""
    folder = rundir.find(own["run.root"], own["run"]) if own["run"] != "latest" else newest_trained(own["run.root"])
    fresh, old = defaults([]), rundir.read_manifest(folder).config
    if old.get("evaluate"):
        raise ConfigError(f"run={folder.name}: is an evaluation itself; give the run that it evaluates")
    kept = {name: section for name, section in old.items() if name not in ("run", "chaos", "resume", "detach")}
    step = chosen(folder, own["step"])
    container = fresh | kept | {"evaluate": {"weights": str(folder), "step": step}}
    container["run"] = fresh["run"] | {"root": own["run.root"]}
    return configs.from_container(apply(container, overrides)), {"id": folder.name, "step": step}


def of_weights(own: dict[str, str], overrides: list[str]) -> tuple[Config, None]:
    """The defaults and overrides of launch.train, with weights from a folder."""
    with naming(f"weights={own['weights']}"):
        folder = Path(own["weights"]).expanduser().absolute()
        if not folder.is_dir():
            raise ConfigError(f"weights={own['weights']}: no such folder")
        step = chosen(folder, own["step"]) if (folder / "checkpoints").is_dir() else None
    if own["step"] and step is None:
        raise ConfigError(f"step={own['step']}: weights={own['weights']} is not a run, and has no steps")
    container = defaults([*overrides, f"run.root={own['run.root']}"])
    container["evaluate"] = {"weights": str(folder), "step": step}
    return configs.from_container(container), None


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


if __name__ == "__main__":
    main("evaluate", work)
