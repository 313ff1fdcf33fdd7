"""The providers of slices, one module each. Each has `connect(config, tell, asked)`, a context in which Ray is
connected to a cluster that holds, or will hold, the slices as labelled nodes; leaving it gives back what the provider
made."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from orchestrator.config import Config
from orchestrator.slices.lease import Lease

MODULES = {"local": "local", "ray": "existing", "gcp": "cloud", "gke": "gke"}


def provider(config: Config) -> ModuleType:
    """Imported when needed: a cloud's client takes half a second."""
    return importlib.import_module(f"orchestrator.slices.{MODULES[config.cluster.kind]}")


@contextmanager
def connect(config: Config, tell: Callable[[str, str], None], asked: Callable[[], bool]) -> Iterator[Lease]:
    """Gives what replaces lost and bad hosts.

    tell: called with each event's kind and text. asked: whether the user wants to stop. Raises ConfigError where the
    provider cannot be reached, StoppedError, and TimeoutError and NoSlicesError where it gives nothing.
    """
    with provider(config).connect(config, tell, asked) as lease:
        from ray._private import worker

        worker._worker_logs_enabled = False  # we report a death ourselves, in one line
        yield lease
