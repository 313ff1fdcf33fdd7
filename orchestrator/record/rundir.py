"""The run directory: the truth about a run. Every tool reads it through here.

runs/ID/ manifest.json metrics.jsonl events.jsonl goodput.json checkpoints/ logs/ wandb/ controller.lock
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gemma.config import ConfigError, naming

KEPT_LINES = 100_000  # of a file that cannot be written: some 50 MB
DETACHED = "detached.json"
LOCK_TIMEOUT_S = 0.3  # a status command holds the lock for an instant while it looks


@dataclass(frozen=True)
class Attempt:
    """One command that worked on the run."""

    command: str  # train or resume
    overrides: list[str]
    time: float
    git_commit: str | None = None  # not there in older manifests, nor is Manifest.git_diff


@dataclass(frozen=True)
class Detached:
    """What lies here of a run whose directory lies on a cluster."""

    dashboard: str  # HOST:PORT
    root: str  # there


@dataclass(frozen=True)
class Manifest:
    id: str
    created: float
    config: dict[str, Any]  # resolved; the last attempt's
    attempts: list[Attempt]
    git_commit: str | None  # of the last attempt
    versions: dict[str, str]
    mesh: dict[str, int]  # filled
    wandb_id: str
    parent: dict[str, Any] | None  # of a fork: the id and step that it began from
    git_diff: str | None = None  # of the last attempt's working tree against that commit


def new_id(model: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]", "-", model)[:40]
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}"


def create(root: str, run_id: str) -> Path:
    """Makes runs/ID. Raises ConfigError where it exists or cannot be made."""
    folder = Path(root).expanduser().absolute() / run_id
    try:
        folder.mkdir(parents=True)
        (folder / "logs").mkdir()
    except FileExistsError as error:
        if folder.is_dir():
            raise ConfigError(f"run.id={run_id}: exists in {root}; go on with launch.resume run={run_id}") from error
        raise ConfigError(f"run.root={root}: cannot make {folder} (a file is in the way)") from error
    except OSError as error:
        raise ConfigError(f"run.root={root}: cannot make {folder} ({error.strerror})") from error
    return folder


def find(root: str, run: str) -> Path:
    """The directory of run=ID or run=latest. Raises ConfigError naming what there is."""
    named = Path(root).expanduser().absolute() / run
    with naming(f"run={run} run.root={root}"):
        if run != "latest" and (named / "manifest.json").is_file():
            read_manifest(named)
            return named
        if run != "latest" and (there := detached(named)):
            raise ConfigError(
                f"run={run}: lies on the cluster of {there.dashboard}, in {there.root}; allowed are launch.status,"
                " launch.logs, launch.stop, and launch.resume with detach=true"
            )
        known = runs(root)
    if not known:
        raise ConfigError(f"run={run}: no runs in run.root={root}")
    if run == "latest":
        return known[-1]
    shown = ", ".join(folder.name for folder in known[-5:])
    raise ConfigError(f"run={run}: no such run in run.root={root}; the newest are {shown} (or latest)")


def runs(root: str) -> list[Path]:
    """Every run below root, oldest first by the time in its manifest."""
    created: dict[Path, float] = {}
    for path in Path(root).expanduser().absolute().glob("*/manifest.json"):
        with contextlib.suppress(ConfigError):  # one broken run does not hide the others
            created[path.parent] = read_manifest(path.parent).created
    return sorted(created, key=lambda folder: created[folder])


def detached(folder: Path) -> Detached | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Detached(**json.loads((folder / DETACHED).read_text()))
    return None


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Whole or not at all: written beside, then renamed. Raises OSError where the disk does not take it."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    text = json.dumps(value, indent=2) + "\n"
    try:
        partial.touch(mode)
        partial.write_text(text)
        partial.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def try_text(path: Path, text: str) -> bool:
    """Writes what a run can go on without; whether it could."""
    with contextlib.suppress(OSError):
        path.write_text(text)
        return True
    return False


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Raises ConfigError where the disk does not take it: no run goes on without."""
    path = folder / "manifest.json"
    try:
        write_json(path, asdict(manifest), 0o600 if manifest.git_diff else 0o644)
    except OSError as error:
        raise ConfigError(f"run={folder.name}: cannot write {path} ({error.strerror})") from error


def read_manifest(folder: Path) -> Manifest:
    """Raises ConfigError naming the file where it is not a manifest."""
    path = folder / "manifest.json"
    try:
        found = json.loads(path.read_text())
        return Manifest(**(found | {"attempts": [Attempt(**a) for a in found["attempts"]]}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"run={folder.name}: {path} is not a manifest ({error})") from error


class Appender:
    """A jsonl file that grows by whole lines, each handed to the system at once.

    Lines that the disk does not take are kept in memory, KEPT_LINES at most, and written before the next.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.waiting: deque[bytes] = deque()
        self.lost = 0  # lines: the oldest give way once there are too many
        self.problem: str | None = None  # why lines wait
        if os.fstat(self.file).st_size and not ends_line(path):
            self.waiting.append(b"\n")  # what a killed writer left unfinished

    def write(self, row: dict[str, Any]) -> None:
        self.waiting.append(json.dumps(row).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes what waits, as far as the disk takes it."""
        try:
            while self.waiting:
                append_whole(self.file, self.waiting[0])
                self.waiting.popleft()
            self.problem = None
        except OSError as error:
            self.problem = f"{self.path.name}: {error.strerror}"
            if len(self.waiting) > KEPT_LINES:
                self.waiting.popleft()
                self.lost += 1


def append_whole(file: int, line: bytes) -> None:
    """A line, or none of it. Raises OSError."""
    size, left = os.fstat(file).st_size, line
    try:
        while left:
            left = left[os.write(file, left) :]
    except OSError:
        if left != line:
            os.ftruncate(file, size)
        raise


def ends_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a jsonl file; a torn line is passed over."""
    if not path.exists():
        return
    with open(path) as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """The last row of each step, by step: a step done again counts as it came out last."""
    return {row["step"]: row for row in read_lines(folder / "metrics.jsonl")}


def events(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder / "events.jsonl"))


def committed(folder: Path) -> list[int]:
    """Steps with a whole checkpoint, oldest first. Orbax renames a checkpoint to its step when it is whole."""
    path = folder / "checkpoints"
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []


def lock(folder: Path) -> IO[str]:
    """Held by the run's controller; the kernel frees it when that dies. Raises ConfigError where another holds it."""
    file = open(folder / "controller.lock", "a+")  # noqa: SIM115 - held until the process ends
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip()
                file.close()
                raise ConfigError(f"run={folder.name}: is being driven by process {holder}; stop that first") from None
            time.sleep(0.02)
    with contextlib.suppress(OSError):  # a full disk: held all the same
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    return file


def is_locked(folder: Path) -> bool:
    path = folder / "controller.lock"
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def driver(folder: Path) -> int | None:
    """The process of this machine that drives a run; None where there is none that can be told."""
    path = (folder / "controller.lock").resolve()
    with contextlib.suppress(OSError, ValueError):
        pid = int(path.read_text())
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():  # the number alone may be another machine's
            with contextlib.suppress(OSError):
                if Path(os.readlink(descriptor)) == path:
                    return pid
    return None
