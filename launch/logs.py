"""python -m launch.logs run=ID|latest [follow=true] [host=RANK]: what a run's processes printed."""

import time
from collections.abc import Mapping
from pathlib import Path

from gemma.config import ConfigError
from launch import detached
from launch.command import arguments, main
from orchestrator.exit import Exit
from orchestrator.record import rundir

USAGE = f"""Show what a run's hosts printed in its newest attempt, and the stories of its failures.

  python -m launch.logs run=latest
  python -m launch.logs run=ID follow=true host=0            one host's, as it is written
  python -m launch.logs run=ID cluster.address=HOST:PORT     a detached run's, from anywhere

Of a detached run it shows what the controller printed; with host=RANK, that host's.

  run       the run's id, or latest (required)
  run.root  where runs lie (default: runs)
  follow    true: and what comes, until the run ends (default: false)
  host      one host's only, by its rank
  lines     the last of each file (default: 200); 0 is all
{detached.USAGE}"""

POLL_S = 0.3
ANSWER_S = 120.0


def work() -> int:
    known = {"run": "", "run.root": "runs", "follow": "false", "host": "", "lines": "200"} | detached.CLUSTER
    own, rest = arguments(known, USAGE)
    if rest:
        raise ConfigError(f"{rest[0].partition('=')[0]}: unknown key; allowed: {', '.join(known)}")
    if not own["run"]:
        raise ConfigError("run: missing; allowed is run=ID or run=latest")
    if own["follow"] not in ("true", "false"):
        raise ConfigError(f"follow={own['follow']}: allowed are true and false")
    for key in ("host", "lines"):
        if own[key] and not own[key].isdigit():
            raise ConfigError(f"{key}={own[key]}: must be a whole number")
    follow, lines = own["follow"] == "true", int(own["lines"] or 0)
    try:
        if at := detached.dashboard(own):
            return show_there(own, at, follow, lines)
        return show(rundir.find(own["run.root"], own["run"]), own["host"], follow, lines)
    except KeyboardInterrupt:  # the way to leave follow=true
        return Exit.FINISHED


def files(folder: Path, host: str) -> list[Path]:
    """Of the newest attempt, hosts by rank; then the stories."""
    logs = [(numbers(path), path) for path in (folder / "logs").glob("attempt-*-host-*.log")]
    newest = max((attempt for (attempt, _), _ in logs), default=0)
    hosts = [path for (attempt, rank), path in sorted(logs) if attempt == newest and host in ("", str(rank))]
    return hosts + ([] if host else sorted((folder / "logs").glob("*-failure.txt")))


def numbers(path: Path) -> tuple[int, int]:
    """The attempt and the rank of attempt-A-host-R.log."""
    _, attempt, _, rank = path.stem.split("-")
    return int(attempt), int(rank)


def last(text: str, lines: int) -> str:
    """Its last lines, all for 0."""
    return "".join(text.splitlines(keepends=True)[-lines:]) if lines else text


def show(folder: Path, host: str, follow: bool, lines: int) -> int:
    """Each file under its name, as tail does it."""
    shown: dict[Path, int] = {}  # bytes
    named: Path | None = None
    while True:
        running = rundir.is_locked(folder)  # looked at first: what is written before the end is shown
        for path in dict.fromkeys([*shown, *files(folder, host)]):  # what an earlier attempt had yet to write, too
            size, seen = path.stat().st_size, shown.get(path)
            if size == seen:
                continue
            with open(path, "rb") as file:
                file.seek(seen or 0)
                text = file.read(size - (seen or 0)).decode(errors="replace")
            if path != named:
                print(f"==> {path.relative_to(folder)} <==")
            print(last(text, lines) if seen is None else text, end="", flush=True)
            shown[path], named = size, path
        if not follow or not running:
            break
        time.sleep(POLL_S)
    if not shown:
        print(f"run {folder.name}: no logs yet" + f" of host {host}" * bool(host))
    return Exit.FINISHED


def show_there(own: Mapping[str, str], at: str, follow: bool, lines: int) -> int:
    from orchestrator import jobs

    if own["host"]:
        if follow:
            raise ConfigError("follow=true: of a detached run it goes with what the controller prints, not with host")
        return detached.run_command(own, at, "logs", [f"host={own['host']}", f"lines={lines}"], ANSWER_S)
    head = jobs.connect(at)
    found = jobs.find(head, own["run"])
    if follow:
        jobs.follow(head, found.id, lambda part: print(part, end="", flush=True))
    else:
        print(last(jobs.output(head, found.id), lines), end="")
    return Exit.FINISHED


if __name__ == "__main__":
    main("logs", work)
