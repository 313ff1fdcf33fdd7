"""python -m launch.status [run=ID|latest]: the runs, or one of them."""

import time
from pathlib import Path

from gemma.config import ConfigError
from launch import detached
from launch.command import arguments, main
from orchestrator.record import rundir
from orchestrator.record.progress import shown

USAGE = f"""List runs: state, step, loss, goodput.

  python -m launch.status
  python -m launch.status run=latest      one run: where its time went and its last events
  python -m launch.status cluster.address=HOST:PORT    the detached runs of a cluster, from anywhere
  python -m launch.status cluster.address=HOST:PORT run=ID

  run       a run's id, or latest
  run.root  where runs lie (default: runs)
{detached.USAGE}"""

EVENTS_SHOWN = 12
ANSWER_S = 120.0


def state(folder: Path) -> str:
    """running, finished, stopped, gave up; or died, where a controller ended without a word."""
    if rundir.is_locked(folder):
        return "running"
    ends = {"finish": "finished", "stop": "stopped", "give_up": "gave up", "refuse": "refused"}
    last = (rundir.events(folder) or [{"event": ""}])[-1]
    if last.get("decision") == "GiveUp":
        return "gave up"
    return ends.get(last["event"], "died")


def line(folder: Path) -> list[str]:
    manifest = rundir.read_manifest(folder)
    rows = rundir.metrics(folder)
    step = max(rows, default=0)
    done = f"{step}/{manifest.config['train']['steps']}"
    loss = shown(rows[step].get("loss"), 4) if rows else "-"
    if manifest.config.get("serve"):
        done, loss = "-", f"{rows[step].get('tokens_per_s') or 0.0:.0f} tokens/s" if rows else "-"
    goodput = rundir.goodput(folder)
    share = "-" if goodput is None or goodput["goodput"] is None else f"{goodput['goodput']:.1%}"
    age = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.created))
    copied = "" if manifest.id == folder.name else f", a copy of {manifest.id}"
    return [folder.name, state(folder) + copied, done, loss, share, age]


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def detail(folder: Path) -> str:
    lines = []
    if parent := rundir.read_manifest(folder).parent:
        lines.append(f"begun from run {parent.get('id')} at step {parent.get('step')}")
    if found := rundir.goodput(folder):
        buckets = sorted(found["buckets"].items(), key=lambda item: -item[1])
        lines += [f"wall {found['wall_s']:.1f} s, restarts {found['restarts']}"]
        lines += [f"  {name:8} {seconds:9.1f} s" for name, seconds in buckets if seconds >= 0.05]
    told = rundir.events(folder)
    lines += [
        f"quarantined: host {e['host']} (worker {e['worker']} of {e['slice']}): {e['why']}"
        for e in told
        if e["event"] == "unfit"
    ]
    if parts := rundir.replicas(folder):
        lines += [table([line(part) for part in parts])]
    lines += [f"checkpoints at steps {rundir.committed(folder)} in {folder / 'checkpoints'}", "last events:"]
    for event in told[-EVENTS_SHOWN:]:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        evidence = {k: v for k, v in event.items() if k not in ("time", "event", "attempt", "step", "hosts", "seconds")}
        facts = " ".join(f"{key}={value}" for key, value in evidence.items())
        lines += [f"  {clock} attempt {event['attempt']} step {event['step']:>6} {event['event']:10} {facts}"]
    return "\n".join(lines)


def elsewhere(root: str) -> list[list[str]]:
    """Runs that were submitted from here, and whose directories are not here."""
    found = []
    for path in sorted(Path(root).expanduser().glob(f"*/{rundir.DETACHED}")):
        noted = rundir.detached(path.parent)
        if noted and not (path.parent / "manifest.json").exists():
            submitted = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            found.append([path.parent.name, f"on {noted.dashboard}", "-", "-", "-", submitted])
    return found


def show_there(own: dict[str, str], at: str) -> int:
    """Runs of which only their jobs are known here; or one of them, asked where it lies."""
    from orchestrator import jobs

    if own["run"]:
        return detached.run_command(own, at, "status", [], ANSWER_S)
    found = jobs.jobs(jobs.connect(at))
    clocks = [time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)) for job in found]
    rows = [[job.run, job.state, clock, job.root] for job, clock in zip(found, clocks, strict=True)]
    print(table([["run", "state", "began", "in"], *rows]) if rows else f"no runs are known to the cluster of {at}")
    return 0


def work() -> int:
    known = {"run": "", "run.root": "runs"} | detached.CLUSTER
    own, rest = arguments(known, USAGE)
    if rest:
        raise ConfigError(f"{rest[0].partition('=')[0]}: unknown key; allowed: {', '.join(known)}")
    if at := detached.dashboard(own):
        return show_there(own, at)
    folders = [rundir.find(own["run.root"], own["run"])] if own["run"] else rundir.runs(own["run.root"])
    others = [] if own["run"] else elsewhere(own["run.root"])
    if not folders and not others:
        print(f"no runs in {own['run.root']}; start one with python -m launch.train")
        return 0
    print(table([["run", "state", "step", "loss", "goodput", "started"], *map(line, folders), *others]))
    if own["run"]:
        print(detail(folders[0]))
    return 0


if __name__ == "__main__":
    main("status", work)
