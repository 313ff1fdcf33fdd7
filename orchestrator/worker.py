"""The process of one host: a Ray actor around `gemma.trainer.Trainer`. The one file here that may import JAX.

It raises nothing to the controller: what a verb raised comes back as a `Raised`, in plain text, so that the
controller needs no class of the program's to read it.
"""

import glob
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma.config import ConfigError, Program
from orchestrator.topology import CHIPS_PER_HOST

if TYPE_CHECKING:
    from gemma.trainer import Trainer

# Left by an earlier attempt or slice they make the next one hang.
STALE = ("MEGASCALE_", "TPU_PROCESS_", "TPU_VISIBLE_", "CLOUD_TPU_TASK_ID", "JAX_COORDINATOR", "XLA_FLAGS")


@dataclass(frozen=True)
class Raised:
    """An exception of the program, told in text."""

    exception: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Hello:
    pid: int
    coordinator: str  # where this host would listen, were it rank 0


class Host:
    """Created on its host's node; a verb at a time, in the order they come."""

    def __init__(self, log: str, env: dict[str, str], predecessors: list[int], timeout_s: float):
        """Imports everything heavy. log: where this process writes; predecessors: pids that must be gone first."""
        redirect(log)
        wait_gone(predecessors, timeout_s)
        for name in [name for name in os.environ if name.startswith(STALE)]:
            del os.environ[name]
        if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
            os.environ["JAX_PLATFORMS"] = "cpu"
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CHIPS_PER_HOST}"
        os.environ.update(env)
        import gemma.trainer  # noqa: F401 - takes seconds, while the other hosts are still being started

        self.trainer: Trainer | None = None
        self.rank = 0

    def hello(self, ip: str) -> Hello:
        with socket.socket() as probe:
            probe.bind((ip, 0))
            return Hello(os.getpid(), f"{ip}:{probe.getsockname()[1]}")

    def join(self, rank: int, hosts: int, coordinator: str, timeout_s: float) -> Raised | None:
        """Finds the other hosts."""
        import jax

        def connect() -> None:
            self.rank = rank
            if os.environ.get("JAX_PLATFORMS") == "cpu":
                jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(coordinator, hosts, rank, initialization_timeout=int(timeout_s))

        return told(connect)

    def open(self, program: Program, folder: str, cache: str) -> Raised | None:
        """Makes the data and the programs ready."""
        from gemma.trainer import Trainer

        def make() -> None:
            if not Path(folder, "manifest.json").exists():
                where = f"{Path(folder).parent} on host {self.rank} ({socket.gethostname()})"
                raise ConfigError(f"run.root: {where} does not hold the run; give a directory that all hosts share")
            self.trainer = Trainer(program, Path(folder), Path(cache).expanduser())

        return told(make)

    def call(self, verb: str, *args: Any) -> Any:
        """A verb of the trainer. Only rank 0 answers with its result, but for `restore`, which all must agree on."""
        result = told(getattr(self.trainer, verb), *args)
        return result if self.rank == 0 or verb == "restore" or isinstance(result, Raised) else None


def told(function: Any, *args: Any) -> Any:
    """What the function returns, or what it raised."""
    try:
        return function(*args)
    except Exception as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        return Raised(type(error).__name__, str(error), text)


def redirect(log: str) -> None:
    """This process's output, C++ included, goes to the run directory."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def wait_gone(pids: list[int], timeout_s: float) -> None:
    """A half-dead predecessor still holds the chips: wait until its pid is gone. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    for pid in pids:
        while is_running(pid):
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {pid} of the last attempt is still there after {timeout_s:.0f} s")
            time.sleep(0.02)


def is_running(pid: int) -> bool:
    """A zombie holds nothing and does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
