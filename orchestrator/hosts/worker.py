"""The process of one host: a Ray actor around the program that the config names. The one file here that may import JAX.

It raises nothing to the controller: what a verb raised comes back as a `Raised`, in plain text, so that the
controller needs no class of the program's to read it.
"""

import contextlib
import faulthandler
import gc
import glob
import io
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gemma.config import ConfigError, Program
from gemma.messages import ChipFacts, Opened, SaveFailed
from orchestrator.hosts.keeper import NOTICE
from orchestrator.slices.environment import unwanted
from orchestrator.slices.topology import CHIPS_PER_HOST

if TYPE_CHECKING:
    from gemma.engine.server import Server
    from gemma.score.scorer import Scorer
    from gemma.text.corpus import Texts
    from gemma.train.evaluator import Evaluator
    from gemma.train.trainer import Trainer

GARBAGE = 50_000  # objects made before the collector looks at them
SWITCH_S = 0.0005  # a saving thread yields to the training thread after this; Python's default is ten times longer
# Left by an earlier attempt or slice they make the next one hang.
STALE = ("MEGASCALE_", "TPU_PROCESS_", "TPU_VISIBLE_", "CLOUD_TPU_TASK_ID", "JAX_COORDINATOR", "XLA_FLAGS")


@dataclass(frozen=True)
class Raised:
    """An exception of the program, told in text."""

    exception: str
    message: str
    traceback: str
    time: float  # time.time()


@dataclass(frozen=True)
class VerbResult:
    """What a verb returned."""

    value: Any
    notice: str | None  # the machine is about to be taken away
    trouble: SaveFailed | None  # a save that was found to have failed


@dataclass(frozen=True)
class Hello:
    pid: int
    coordinator: str  # the address that this host listens at if it is rank 0


class Host:
    """Created on its host's node, maybe long before it is needed; a verb at a time, in the order they come."""

    def __init__(self) -> None:
        """Imports everything heavy, and touches no chip: another process may have them."""
        for name in unwanted(os.environ):
            del os.environ[name]
        if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
            os.environ["JAX_PLATFORMS"] = "cpu"
        import gemma.train.trainer  # noqa: F401 - takes seconds, while other hosts are being started or are training

        # Imported modules are never freed: scanning them would delay a step or a save by 50 ms now and then.
        gc.freeze()
        gc.set_threshold(GARBAGE)
        sys.setswitchinterval(SWITCH_S)
        self.program: Trainer | Evaluator | Scorer | Server | None = None
        self.texts: Texts | None = None
        self.rank = 0
        self.notice: str | None = None
        self.spoilt = False

    def ping(self) -> None:
        """Answers once everything is imported."""

    def begin(self, log: str, env: dict[str, str], predecessors: list[int], timeout_s: float) -> Raised | None:
        """Takes part in an attempt. log: where this process writes; predecessors: pids that must be gone first."""
        with contextlib.suppress(OSError):  # on a full disk the run goes on without these
            redirect(log)
            faulthandler.enable(open(f"{log}.crash", "w"))  # noqa: SIM115 - as long as the process
            faulthandler.register(signal.SIGUSR1, open(f"{log}.stacks", "w"), chain=False)  # noqa: SIM115
        signal.signal(signal.SIGTERM, self.noticed)
        signal.signal(NOTICE, self.noticed)
        for name in [name for name in os.environ if name.startswith(STALE)]:
            del os.environ[name]
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CHIPS_PER_HOST}"
        os.environ.update(env)
        return caught(wait_gone, predecessors, timeout_s)

    def noticed(self, number: int, _: FrameType | None) -> None:
        """The machine is about to be taken away: told with the next answer. The same signal again ends the process."""
        name = signal.Signals(number).name
        if self.notice == name:
            os._exit(128 + number)
        self.notice = name

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
            signal.signal(signal.SIGTERM, self.noticed)  # JAX has put its own in place

        return caught(connect)

    def spoil(self) -> None:
        """A rehearsal: a chip of this host multiplies wrong."""
        self.spoilt = True

    def check(self, chips: int, chips_in_all: int, cache: str) -> ChipFacts | Raised:
        """What this host finds out about its chips by itself."""
        from gemma.train import fitness

        found: ChipFacts | Raised = caught(fitness.alone, chips, chips_in_all, Path(cache).expanduser(), self.spoilt)
        return found

    def meet(self, cache: str) -> tuple[int, ...] | Raised:
        """What its chips hear of all others."""
        from gemma.train import fitness

        heard: tuple[int, ...] | Raised = caught(fitness.meet, Path(cache).expanduser())
        return heard

    def tokenise(self, program: Program, cache: str, wait_s: float) -> Raised | None:
        """Makes the text ready. wait_s: for another process that tokenises the same, at most."""
        from gemma.text import corpus

        def make() -> None:
            folder, vocab = Path(cache).expanduser(), program.model.vocab
            self.texts = corpus.open_texts(program.data, program.eval, folder, vocab, wait_s)

        return caught(make)

    def open(self, program: Program, folder: str, cache: str) -> Any:
        """Makes the programs ready; Opened, or what was Raised."""
        from gemma.engine.server import Server
        from gemma.score.scorer import Scorer
        from gemma.train.evaluator import Evaluator
        from gemma.train.trainer import Trainer

        def make() -> Opened:
            if not Path(folder, "manifest.json").exists():
                where = f"{Path(folder).parent} on host {self.rank} ({socket.gethostname()})"
                raise ConfigError(f"run.root: {where} does not hold the run; give a directory that all hosts share")
            evaluates = Scorer if program.evaluate and program.evaluate.asks else Evaluator
            opens = Server if program.serve else evaluates if program.evaluate else Trainer
            self.program = opens(program, Path(folder), Path(cache).expanduser(), self.texts)
            gc.freeze()
            return self.program.opened()

        return caught(make)

    def call(self, verb: str, *args: Any) -> VerbResult | Raised:
        """A verb of the program. Rank 0 returns its result; the others only what all must agree on."""
        result = caught(getattr(self.program, verb), *args)
        if isinstance(result, Raised):
            return result
        if self.rank > 0 and not getattr(self.program, "by_host", False):
            result = replace(result, rows=(), evals=()) if verb == "restore" else None
        assert self.program is not None
        return VerbResult(result, self.notice, self.program.trouble())


def caught(function: Any, *args: Any) -> Any:
    """What the function returns, or what it raised."""
    try:
        return function(*args)
    except Exception as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        return Raised(type(error).__name__, str(error), text, time.time())


def redirect(log: str) -> None:
    """This process's output, C++ included, goes to the run directory."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = io.BufferedWriter(Lossy(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, errors="backslashreplace", line_buffering=True))


class Lossy(io.FileIO):
    """A log on a disk that may be full: what does not fit is lost, and who prints goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


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
