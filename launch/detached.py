"""Runs whose controller is a job on a cluster's head: beginning one, and finding it again from anywhere."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gemma.config import ConfigError
from orchestrator import rundir
from orchestrator.cluster import HOST_PORT, dashboard_of
from orchestrator.exit import Exit
from orchestrator.rundir import Detached

if TYPE_CHECKING:
    from orchestrator.jobs import Head, Job

# Arguments with which a command looks for a run on a cluster. Ray is imported only by those that do.
CLUSTER = {"cluster.address": "", "cluster.dashboard": ""}
USAGE = """  cluster.address, cluster.dashboard
            of the Ray cluster whose head drives the run, HOST:PORT; not needed where it was submitted from"""
HERE = "runs"  # where it is noted what was submitted from here, and where commands look for runs
BEGIN_S = 180.0  # for a job to have looked at its input, which may mean to compile


def dashboard(own: Mapping[str, str]) -> str | None:
    """Of the cluster that the arguments, or what lies here of a run, point to. None: the run lies here."""
    at, address = own["cluster.dashboard"], own["cluster.address"]
    if at or address:
        found = at or dashboard_of(address)
        if not found or not re.fullmatch(HOST_PORT, found):
            key, given = ("cluster.dashboard", at) if at else ("cluster.address", address)
            raise ConfigError(f"{key}={given}: must be HOST:PORT")
        return found
    folder = Path(own["run.root"]).expanduser() / own["run"]
    if not own["run"] or (folder / "manifest.json").exists():
        return None
    noted = rundir.detached(folder)
    return noted.dashboard if noted else None


def whose(head: "Head", own: Mapping[str, str]) -> tuple[str, str]:
    """A run's id, and the folder it lies in on the cluster. Raises ConfigError."""
    from orchestrator import jobs

    noted = rundir.detached(Path(own["run.root"]).expanduser() / own["run"])
    if noted:
        return own["run"], noted.root
    if own["run.root"].startswith("/") and own["run"] != "latest":  # the cluster forgets jobs when its head ends
        return own["run"], own["run.root"]
    found = jobs.find(head, own["run"])
    return found.run, found.root


def noted(run: str, root: str) -> Detached | None:
    """What lies here of a run that was submitted: below run.root, or where a submission notes it."""
    places = (Path(root).expanduser(), Path(HERE))
    return next((there for place in places if (there := rundir.detached(place / run))), None)


def job(there: Detached, run: str) -> "Job":
    """The newest that drives, or drove, a run. Raises ConfigError where its cluster cannot tell."""
    from orchestrator import jobs

    return jobs.find(jobs.connect(there.dashboard), run)


def begin(at: str, run: str, root: str, command: str, arguments: Sequence[str]) -> Exit:
    """Submits a controller, and waits until it has looked at its input. Raises ConfigError with what it refused."""
    from orchestrator import jobs

    head = jobs.connect(at)
    jobs.check_stays(head)
    id = jobs.submit(head, run, root, command, [*arguments, f"run.root={root}"])
    print(f"{command}: submitted as job {id} to the head of {at}", flush=True)
    mark = f"{command}: run {run} "
    in_time = jobs.wait(head, id, BEGIN_S, mark)
    said = jobs.output(head, id)
    if in_time and mark not in said:
        why = [f"detach=true: its job {jobs.look(head, id)[0]} and said nothing", *said.strip().splitlines()][-1]
        jobs.forget(head, id)
        raise ConfigError(why.removeprefix(f"{command}: "))
    note(Path(HERE, run), Detached(at, root))
    if not in_time:
        print(f"{command}: it has not begun after {BEGIN_S:.0f} s, and goes on; python -m launch.logs run={run} tells")
    print(f"run {run}: on the head of {at}, in {Path(root, run)}")
    for verb in ("status", "logs", "stop"):
        print(f"  {verb:7} python -m launch.{verb} run={run}")
    print(f"  from elsewhere, add cluster.dashboard={at}")
    return Exit.FINISHED


def note(folder: Path, what: Detached) -> None:
    """What other commands given here find the run by; a folder that cannot be written costs only that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rundir.write_json(folder / rundir.DETACHED, asdict(what))
    except OSError as error:
        print(f"{folder / rundir.DETACHED}: cannot be written ({error.strerror}); give cluster.dashboard with commands")


def ask(own: Mapping[str, str], at: str, command: str, arguments: Sequence[str], timeout_s: float) -> int:
    """Runs a command where the run lies, and shows what it says; its exit code."""
    from orchestrator import jobs

    head = jobs.connect(at)
    run, root = whose(head, own)
    code, text = jobs.ask(head, run, root, command, arguments, timeout_s)
    if code == Exit.MISTAKE:
        raise ConfigError(["its job said nothing", *text.strip().splitlines()][-1].removeprefix(f"{command}: "))
    print(text.rstrip())
    if code is None:
        print(f"{command}: no answer from the head of {at} within {timeout_s:.0f} s")
    return Exit.GAVE_UP if code is None else code
