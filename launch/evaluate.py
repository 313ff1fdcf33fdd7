"""python -m launch.evaluate run=ID|latest|weights=FOLDER [suite=card] [key=value ...]: benchmarks, or held-out loss."""

from typing import Any

from gemma.config import ConfigError
from launch.command import apply, main
from launch.weights import begin, defaults, given, named_folder, named_run
from orchestrator import config as configs
from orchestrator.config import Config

USAGE = """Evaluate a run's checkpoint, or weights: the tables of the Gemma 2 model card, or the held-out loss, on the
same slices as in training.

  python -m launch.evaluate run=latest suite=quick              a small mixture on examples that are shipped
  python -m launch.evaluate weights=gemma-2-9b model=gemma2_9b data.tokenizer=MODEL suite=card evaluate.data=DIR
  python -m launch.evaluate run=ID tasks=[piqa,mmlu] evaluate.data=DIR evaluate.limit=100
  python -m launch.evaluate run=ID step=400 data=text data.path=DIR            the held-out loss, on other text

  run, weights   what is evaluated: a run (its model, data, mesh and slices are taken unless overridden), or a folder of
                 launch.convert's or Hugging Face's
  step           of a run's checkpoints (default: the newest)
  suite          card, quality, safety or quick; without it and tasks, the held-out loss
  tasks          rows of the card by name, as [piqa,mmlu]
  run.root       where runs lie, and where the evaluation's own directory is made (default: runs)

An evaluation is a run of its own, with an id that launch.status, report, logs, stop and resume take. Its settings are
in conf/evaluate.yaml (evaluate.data, limit, chat, run_code, ...). Any other override of launch.train is one here; of
train, only batch, dtype, accumulation and remat matter."""

BARE = ("suite", "tasks")  # of evaluate, given without the section's name


def work() -> int:
    own, overrides = given(USAGE)
    overrides = [named(override) for override in overrides]
    config, parent = of_run(own, overrides) if own["run"] else of_weights(own, overrides)
    return begin(config, overrides, "evaluate", parent)


def named(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"evaluate.{override}" if key in BARE else override


def of_run(own: dict[str, str], overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """A run's own config, but for what concerns its evaluation; and the run's id and step."""
    folder, step, old = named_run(own)
    fresh = defaults([], "evaluate")
    kept = {name: old[name] for name in old if name not in ("run", "chaos", "resume", "detach", "evaluate", "serve")}
    container = fresh | kept | {"eval": fresh["eval"] | old["eval"]}  # of a run that is older than some of its keys
    container["evaluate"] |= {"weights": str(folder), "step": step, "contamination": True}
    container["run"] = fresh["run"] | {"root": own["run.root"]}
    return checked(apply(container, overrides)), {"id": folder.name, "step": step}


def of_weights(own: dict[str, str], overrides: list[str]) -> tuple[Config, None]:
    """The defaults and overrides of launch.train, with weights from a folder."""
    folder, step = named_folder(own)
    container = defaults([*overrides, f"run.root={own['run.root']}"], "evaluate")
    container["evaluate"] |= {"weights": str(folder), "step": step}
    return checked(container), None


def checked(container: dict[str, Any]) -> Config:
    """Raises ConfigError, also for a suite that is not known."""
    config = configs.from_container(container)
    if config.evaluate is not None and config.evaluate.asks:
        try:
            from orchestrator.evaluation import tasks
        except ImportError as error:
            raise ConfigError(f"evaluate.suite: needs the package {error.name}; pip install '.[evaluate]'") from error
        tasks.row_names(config.evaluate.suite, config.evaluate.tasks)
    return config


if __name__ == "__main__":
    main("evaluate", work)
