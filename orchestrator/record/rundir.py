"""The run directory: the truth about a run. Every tool reads it through here.

runs/ID/ manifest.json metrics.jsonl events.jsonl goodput.json checkpoints/ logs/ wandb/ controller.lock
"""

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import dacite

from gemma.config import ConfigError, naming
from gemma.digest import seal, unseal
from orchestrator.record import jsonfile
from orchestrator.record.jsonfile import is_count, is_number, read_lines, read_object, write_json
from orchestrator.recovery.incident import Incident

KEPT_LINES = 100_000  # of a file that cannot be written: some 50 MB
DETACHED = "detached.json"
SECTIONS = ("run", "model", "train", "cluster")  # of the config in a manifest, that readers go by
Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_pairs(value: Any) -> bool:
    """A list of pairs of counts."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and is_count(pair[0]) and is_count(pair[1]) for pair in value
    )


def is_pairs_or_absent(value: Any) -> bool:
    return value is None or is_pairs(value)


def is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


METRICS_KEYS: dict[str, Check] = {"step": is_count, "loss": is_number_or_null, "bits_per_byte": is_number_or_null}
EVENTS_KEYS: dict[str, Check] = {"event": is_text, "time": is_number, "attempt": is_count, "step": is_count}
EVENT_DEFAULTS: dict[str, Any] = {"time": 0.0, "attempt": 0, "step": 0}  # where a row says nothing
EVENT_KEYS: dict[str, dict[str, Check]] = {  # of some events, what readers go by
    **dict.fromkeys(("set_aside", "bad_step"), {"step": is_count}),
    "commit": {"step": is_count, "batches": is_pairs_or_absent},
    "eval": {"step": is_count, "loss": is_number_or_null, "bits_per_byte": is_number_or_null},
    "chaos": {"index": is_count},
    **dict.fromkeys(("initialise", "restore"), {"batches": is_pairs_or_absent}),
    "skip_batch": {"places": is_pairs},
    "unfit": dict.fromkeys(("host", "slice", "node", "why"), is_text) | {"worker": is_count},
}
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
    mesh: dict[str, Any]  # axis sizes, filled
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
        try:
            created[path.parent] = read_manifest(path.parent).created
        except ConfigError as error:  # one broken run does not hide the others
            jsonfile.warn(path, f"the run is not shown ({error})")
    return sorted(created, key=lambda folder: created[folder])


def replicas(folder: Path) -> list[Path]:
    """A server's, where it has several: each is a run within it, run=ID/replica-N."""
    return sorted(
        (path.parent for path in folder.glob("replica-*/manifest.json")),
        key=lambda found: int(found.name.partition("-")[2]),
    )


def detached(folder: Path) -> Detached | None:
    found = read_object(folder / DETACHED) or {}
    dashboard, root = found.get("dashboard"), found.get("root")
    return Detached(dashboard, root) if isinstance(dashboard, str) and isinstance(root, str) else None


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
        found = asdict(manifest)
        write_json(path, found | {"config": seal(found["config"])}, 0o600 if manifest.git_diff else 0o644)
    except OSError as error:
        raise ConfigError(f"run={folder.name}: cannot write {path} ({error.strerror})") from error


def read_manifest(folder: Path) -> Manifest:
    """Raises ConfigError naming the file where it is not a manifest."""
    path = folder / "manifest.json"
    try:
        found = jsonfile.parse(path.read_bytes())
        found["config"] = unseal(found.get("config"))
        manifest = dacite.from_dict(Manifest, found, dacite.Config(strict=True))
        if not all(isinstance(manifest.config.get(name), dict) for name in SECTIONS):
            raise ValueError(f"its config lacks one of {', '.join(SECTIONS)}")
        if not is_count(manifest.config["train"].get("steps")):
            raise ValueError("its train.steps is no whole number")
    except (OSError, ValueError, TypeError, dacite.DaciteError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"run={folder.name}: {path} is not a manifest ({why})") from error
    return manifest


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
        self.turn = threading.Lock()  # whose line is written
        if os.fstat(self.file).st_size and not ends_line(path):
            self.waiting.append(b"\n")  # what a killed writer left unfinished

    def write(self, row: dict[str, Any]) -> None:
        with self.turn:
            self.waiting.append(jsonfile.dumps(row).encode() + b"\n")
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


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """The last row of each step, by step: a step done again counts as it came out last."""
    return {row["step"]: row for row in checked_lines(folder / "metrics.jsonl", METRICS_KEYS)}


def events(folder: Path) -> list[dict[str, Any]]:
    """In the order they were written. What EVENTS_KEYS and EVENT_KEYS name is there, and of that type."""
    return list(checked_lines(folder / "events.jsonl", EVENTS_KEYS))


def checked_lines(path: Path, keys: Mapping[str, Check]) -> Iterator[dict[str, Any]]:
    """Rows whose keys are there and well typed; the others are passed over with a warning."""
    bad, first = 0, ""
    defaults = EVENT_DEFAULTS if keys is EVENTS_KEYS else {}
    for row in read_lines(path):
        own = EVENT_KEYS.get(str(row.get("event")), {}) if keys is EVENTS_KEYS else {}
        needed = {key: is_right for key, is_right in keys.items() if key in row or key not in defaults} | own
        wrong = next((key for key, is_right in needed.items() if not is_right(row.get(key))), None)
        if wrong is None:
            yield defaults | row
        else:
            bad, first = bad + 1, first or f"{wrong}={str(row.get(wrong))[:40]} at step {str(row.get('step'))[:20]}"
    if bad:
        jsonfile.warn(path, f"{bad} rows lack a key or have one of another type, and are passed over ({first})")


def goodput(folder: Path) -> dict[str, Any] | None:
    """goodput.json with well-typed values only; None where there is none that can be read."""
    found = read_object(folder / "goodput.json")
    if found is None:
        return None
    buckets, incidents = found.get("buckets"), found.get("incidents")
    seconds = {k: v for k, v in buckets.items() if is_number(v) and v >= 0} if isinstance(buckets, dict) else {}
    return found | {
        "wall_s": found["wall_s"] if is_number(found.get("wall_s")) else sum(seconds.values()),
        "goodput": found["goodput"] if is_number(found.get("goodput")) else None,
        "restarts": found["restarts"] if is_count(found.get("restarts")) else 0,
        "buckets": seconds,
        "incidents": [row for row in incidents if is_incident(row)] if isinstance(incidents, list) else [],
    }


def is_incident(row: Any) -> bool:
    try:
        dacite.from_dict(Incident, row, dacite.Config(strict=True))
    except (dacite.DaciteError, TypeError, AttributeError):
        return False
    return True


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
