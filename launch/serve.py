"""python -m launch.serve run=ID|latest|weights=FOLDER [key=value ...]: serves weights by OpenAI's API."""

from typing import Any

from launch.command import apply, main
from launch.weights import begin, defaults, given, named_folder, named_run
from orchestrator import config as configs
from orchestrator.config import Config

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
    own, overrides = given(USAGE)
    config, parent = of_run(own, overrides) if own["run"] else of_weights(own, overrides)
    return begin(config, overrides, "serve", parent)


def of_run(own: dict[str, str], overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """The defaults of a server with a run's model and tokenizer; and the run's id and step."""
    folder, step, old = named_run(own)
    container = defaults([], "serve") | {name: old[name] for name in OF_A_RUN}
    container["serve"] |= {"checkpoint": str(folder), "step": step}
    container["run"] |= {"root": own["run.root"]}
    return configs.from_container(apply(container, overrides)), {"id": folder.name, "step": step}


def of_weights(own: dict[str, str], overrides: list[str]) -> tuple[Config, None]:
    folder, step = named_folder(own)
    container = defaults([*overrides, f"run.root={own['run.root']}"], "serve")
    container["serve"] |= {"checkpoint": str(folder), "step": step}
    return configs.from_container(container), None


if __name__ == "__main__":
    main("serve", work)
