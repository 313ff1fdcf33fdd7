"""Who gives the slices: one module a provider. Each has `connect(config)`, a context in which Ray is connected to a
cluster that holds, or will hold, the slices as labelled nodes; leaving it gives back what the provider made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.config import Config


@contextmanager
def connect(config: Config) -> Iterator[Callable[[], None]]:
    """Gives what replaces lost hosts: it is called again and again while some are waited for.

    Raises ConfigError where the provider cannot be reached.
    """
    from orchestrator.slices import existing, local

    provider = {"local": local.connect, "ray": existing.connect}[config.cluster.kind]
    with provider(config) as repair:
        from ray._private import worker

        worker._worker_logs_enabled = False  # a death is told by us, in one line
        yield repair
