"""python -m launch.report run=ID|latest: a run on one HTML page."""

import os
import time
from pathlib import Path

from gemma.config import ConfigError
from launch.command import arguments, main
from launch.status import state
from orchestrator.page.history import read
from orchestrator.page.page import page
from orchestrator.record import rundir

USAGE = """Write a run as one HTML page that needs no network: curves, timeline, incidents, where its time went.

  python -m launch.report run=latest
  python -m launch.report run=ID to=report.html

  run       a run's id, or latest
  run.root  where runs lie (default: runs)
  to        the file to write (default: report.html in the run's directory)"""


def write(path: Path, content: str) -> None:
    """Whole or not at all. Raises ConfigError naming the file."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        partial.write_text(content, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"to={path}: cannot be written ({error.strerror})") from error


def work() -> int:
    own, rest = arguments({"run": "", "run.root": "runs", "to": ""}, USAGE)
    if rest:
        raise ConfigError(f"{rest[0].partition('=')[0]}: unknown key; allowed: run, run.root, to")
    if not own["run"]:
        raise ConfigError("run: missing; allowed is run=ID or run=latest")
    folder = rundir.find(own["run.root"], own["run"])
    path = Path(own["to"]).expanduser() if own["to"] else folder / "report.html"
    write(path, page(read(folder, state(folder), time.time())))
    print(path)
    return 0


if __name__ == "__main__":
    main("report", work)
