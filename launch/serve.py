"""python -m launch.serve run=ID|latest|weights=FOLDER [key=value ...]: serves weights by OpenAI's API."""

from pathlib import Path
from typing import Any

from gemma.config import ConfigError, naming
from launch.command import apply, arguments, main, process_started
from launch.evaluate import chosen, defaults, newest_trained
from orchestrator import config as configs
from orchestrator.config import Config
from orchestrator.interrupt import Interrupt
from orchestrator.plan import preflight
from orchestrator.record import manifest, rundir

USAGE = """Serve a run's checkpoint, or weights, by OpenAI's API (chat/completions, completions, models), on the same
slices as in training.

  python -m launch.serve run=latest                             the newest checkpoint of the newest run
  python -m launch.serve run=ID step=400 serve.port=9000
  python -m launch.serve weights=gemma-2-2b-it model=gemma2_2b data.tokenizer=tokenizer.model cluster=gcp
  curl 127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"model": "gemma-2", "messages": [{"role": "user", "content": "Hello"}]}'

  run, weights   what is served: a run (its model and tokenizer are taken), or a folder of launch.convert's or Hugging
                 Face's
  step           of a run's checkpoints (default: the newest)
  run.root       where runs lie, and where the server's own directory is made (default: runs)

A server is a run of its own, with an id that launch.status, logs and stop take. Its settings are in conf/serve.yaml
(serve.slots, serve.host, serve.port, serve.api_keys, ...); any other override of launch.train is one here, as cluster
and mesh. Ctrl-C or SIGTERM finishes what runs and refuses what is new; a second one leaves at once."""

OF_A_RUN = ("model", "data")  # sections that are taken from the run that is served


def work() -> int:
    own, overrides = arguments({"run": "", "weights": "", "step": "", "run.root": "runs"}, USAGE)
    if bool(own["run"]) == bool(own["weights"]):
        raise ConfigError("run, weights: give one of them: run=ID, run=latest or weights=FOLDER")
    if own["step"] and not own["step"].isdecimal():
        raise ConfigError(f"step={own['step']}: must be a whole number")
    config, parent = of_run(own, overrides) if own["run"] else of_weights(own, overrides)
    preflight.check(config)
    run_id = config.run.id or rundir.new_id(f"{config.model.name}-serve")
    config = configs.with_id(config, run_id, config.run.root)
    with Interrupt() as interrupt:
        folder = rundir.create(config.run.root, run_id)
        lock = rundir.lock(folder)
        rundir.write_manifest(folder, manifest.new(config, overrides, "serve", parent))

        from orchestrator.run import run  # Ray: not before the input is known to be good

        return run(config, folder, lock, interrupt, process_started())


def of_run(own: dict[str, str], overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """The defaults of a server with a run's model and tokenizer; and the run's id and step."""
    folder = rundir.find(own["run.root"], own["run"]) if own["run"] != "latest" else newest_trained(own["run.root"])
    old = rundir.read_manifest(folder).config
    if old.get("evaluate") or old.get("serve"):
        raise ConfigError(f"run={folder.name}: has no weights of its own; give the run that trained them")
    step = chosen(folder, own["step"])
    container = defaults([], "serve")
    container |= {name: old[name] for name in OF_A_RUN}
    container["serve"] |= {"checkpoint": str(folder), "step": step}
    container["run"] |= {"root": own["run.root"]}
    return configs.from_container(apply(container, overrides)), {"id": folder.name, "step": step}


def of_weights(own: dict[str, str], overrides: list[str]) -> tuple[Config, None]:
    with naming(f"weights={own['weights']}"):
        folder = Path(own["weights"]).expanduser().absolute()
        if not folder.is_dir():
            raise ConfigError(f"weights={own['weights']}: no such folder")
        step = chosen(folder, own["step"]) if (folder / "checkpoints").is_dir() else None
    if own["step"] and step is None:
        raise ConfigError(f"step={own['step']}: weights={own['weights']} is not a run, and has no steps")
    container = defaults([*overrides, f"run.root={own['run.root']}"], "serve")
    container["serve"] |= {"checkpoint": str(folder), "step": step}
    return configs.from_container(container), None


if __name__ == "__main__":
    main("serve", work)
