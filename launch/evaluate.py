"""python -m launch.evaluate run=ID|latest|weights=FOLDER [key=value ...]: held-out loss of a checkpoint or weights."""

from typing import Any

from launch.command import apply, main
from launch.weights import begin, defaults, given, named_folder, named_run
from orchestrator import config as configs
from orchestrator.config import Config

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
    own, overrides = given(USAGE)
    config, parent = of_run(own, overrides) if own["run"] else of_weights(own, overrides)
    return begin(config, overrides, "evaluate", parent)


def of_run(own: dict[str, str], overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """A run's own config, but for what concerns its evaluation; and the run's id and step."""
    folder, step, old = named_run(own)
    fresh = defaults([])
    kept = {name: section for name, section in old.items() if name not in ("run", "chaos", "resume", "detach")}
    container = fresh | kept | {"evaluate": {"weights": str(folder), "step": step}}
    container["run"] = fresh["run"] | {"root": own["run.root"]}
    return configs.from_container(apply(container, overrides)), {"id": folder.name, "step": step}


def of_weights(own: dict[str, str], overrides: list[str]) -> tuple[Config, None]:
    """The defaults and overrides of launch.train, with weights from a folder."""
    folder, step = named_folder(own)
    container = defaults([*overrides, f"run.root={own['run.root']}"])
    container["evaluate"] = {"weights": str(folder), "step": step}
    return configs.from_container(container), None


if __name__ == "__main__":
    main("evaluate", work)
