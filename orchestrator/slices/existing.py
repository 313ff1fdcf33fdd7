"""cluster=ray: TPU nodes of a Ray cluster that exists already."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.interrupt import handlers_kept

CODE = ("gemma", "orchestrator")  # the hosts run the code that was launched, not what lies there


@contextmanager
def connect(config: Config) -> Iterator[Callable[[], None]]:
    """Leaves the cluster as it was: only this run's actors and placement groups end."""
    top = Path(__file__).parents[2]
    modules = [str(top / name) for name in CODE]
    try:
        with handlers_kept():
            ray.init(
                address=config.cluster.address,
                runtime_env={"py_modules": modules},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"cluster.address={config.cluster.address}: no Ray cluster answers there ({why})") from error
    try:
        yield lambda: None  # its owner's, or its autoscaler's
    finally:
        ray.shutdown()
