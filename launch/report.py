"""python -m launch.report run=ID|latest: a run on one HTML page; compare=[ID,ID,card]: evaluations side by side."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma.config import ConfigError
from launch.command import arguments, main
from launch.status import state
from orchestrator.page.history import read
from orchestrator.page.page import page
from orchestrator.record import rundir

USAGE = """Write a run as one HTML page that needs no network: curves, timeline, incidents, where its time went.

  python -m launch.report run=latest
  python -m launch.report run=ID to=report.html
  python -m launch.report compare=[ID,ID,card]     evaluations' tables side by side, with paired differences

  run       a run's id, or latest
  run.root  where runs lie (default: runs)
  to        the file to write (default: report.html in the run's directory)
  compare   evaluations by id; card is what was published (card:9B of one size)"""


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


def compared(root: str, wanted: str) -> str:
    """Raises ConfigError."""
    from orchestrator.evaluation import results, table

    names = [name.strip() for name in wanted.strip("[]").split(",") if name.strip()]
    if len(names) < 2:
        raise ConfigError(f"compare={wanted}: give two evaluations or more, as in compare=[ID,ID] or compare=[ID,card]")
    found: list[dict[str, Any]] = []
    scores: list[Mapping[str, Mapping[tuple[str, int], float]]] = []
    for name in names:
        if name.partition(":")[0] == "card":
            found.append({"card": name.partition(":")[2] or "9B"})
            scores.append({})
            continue
        folder = rundir.find(root, name)
        result = results.read(folder)
        if result is None:
            raise ConfigError(f"compare={name}: has no {results.RESULTS}: it is no evaluation of a suite, or not done")
        found.append(result)
        scores.append(results.scores(folder))
    return table.compare(found, scores)


def work() -> int:
    own, rest = arguments({"run": "", "run.root": "runs", "to": "", "compare": ""}, USAGE)
    if rest:
        raise ConfigError(f"{rest[0].partition('=')[0]}: unknown key; allowed: run, run.root, to, compare")
    if own["compare"]:
        print(compared(own["run.root"], own["compare"]))
        return 0
    if not own["run"]:
        raise ConfigError("run: missing; allowed is run=ID or run=latest")
    folder = rundir.find(own["run.root"], own["run"])
    path = Path(own["to"]).expanduser() if own["to"] else folder / "report.html"
    write(path, page(read(folder, state(folder), time.time())))
    print(path)
    return 0


if __name__ == "__main__":
    main("report", work)
