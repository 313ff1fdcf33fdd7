"""Runs whose controller is a job on a cluster's head: beginning one, and finding it again from anywhere."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gemma.config import ConfigError
from orchestrator.exit import Exit
from orchestrator.record import rundir
from orchestrator.record.rundir import Detached
from orchestrator.slices.cluster import HOST_PORT, dashboard_of

if TYPE_CHECKING:
    from orchestrator.jobs import Head, Job

# Arguments with which a command looks for a run on a cluster. Ray is imported only by those that do.
CLUSTER = {"cluster.address": "", "cluster.dashboard": ""}
USAGE = """  cluster.address, cluster.dashboard
            of the Ray cluster whose head drives the run, HOST:PORT; not needed where it was submitted from"""
HERE = "runs"  # where it is noted what was submitted from here, and where commands look for runs
BEGIN_S = 600.0  # for a job to have looked at its input, which may mean to compile, on a head with few cores


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


def run_and_root(head: "Head", own: Mapping[str, str]) -> tuple[str, str]:
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


def begin(at: str, run: str, root: str, command: str, arguments: Sequence[str], sweep: bool = False) -> Exit:
    """Submits a controller, and waits until it has looked at its input. Raises ConfigError with what it refused.

    What was submitted goes on, whatever becomes of the waiting.
    """
    from orchestrator import jobs

    head = jobs.connect(at)
    jobs.check_stays(head)
    folder = Path(HERE, run)
    before = rundir.detached(folder)
    id = jobs.submit(head, run, root, command, [*arguments, f"run.root={root}"])
    note(folder, Detached(at, root))
    print(f"{command}: submitted as job {id} to the head of {at}", flush=True)
    left = Exit.FINISHED
    try:
        why = refusal(head, id, f"{command}: run {run} ")
    except ConfigError as error:
        why = ""
        print(f"{command}: {error}")
        print(f"{command}: job {id} goes on, as far as is known here; python -m launch.stop run={run} stops it")
    except KeyboardInterrupt:
        why, left = "", Exit.STOPPED if sweep else left
        print(f"\n{command}: job {id} goes on; python -m launch.stop run={run} stops it")
    if why:
        forget(folder, before)
        raise ConfigError(why.removeprefix(f"{command}: "))
    print(f"run {run}: on the head of {at}, in {Path(root, run)}")
    for verb in ("status", "logs", "stop"):
        print(f"  {verb:7} python -m launch.{verb} run={run}")
    print(f"  from elsewhere, add cluster.dashboard={at}")
    return left


def refusal(head: "Head", id: str, mark: str) -> str:
    """Why a job ended before it printed the mark; nothing where it printed that, or has yet to. Raises ConfigError."""
    from orchestrator import jobs

    in_time = jobs.wait(head, id, BEGIN_S, mark)
    said = jobs.output(head, id)
    if mark in said:
        return ""
    if not in_time:
        print(f"job {id} has not begun after {BEGIN_S:.0f} s, and goes on; launch.logs tells")
        return ""
    why = [f"detach=true: its job {jobs.state_of(head, id)[0]} and said nothing", *said.strip().splitlines()][-1]
    with contextlib.suppress(ConfigError):
        jobs.forget(head, id)
    return why


def note(folder: Path, what: Detached) -> None:
    """What other commands given here find the run by; a folder that cannot be written costs only that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rundir.write_json(folder / rundir.DETACHED, asdict(what))
    except OSError as error:
        print(f"{folder / rundir.DETACHED}: cannot be written ({error.strerror}); give cluster.dashboard with commands")


def forget(folder: Path, before: Detached | None) -> None:
    """Takes back a note, but for what an earlier submission of the run had noted."""
    if before:
        note(folder, before)
        return
    with contextlib.suppress(OSError):  # other things lie there
        (folder / rundir.DETACHED).unlink(missing_ok=True)
        folder.rmdir()
        folder.parent.rmdir()


def run_command(own: Mapping[str, str], at: str, command: str, arguments: Sequence[str], timeout_s: float) -> int:
    """Runs a command where the run lies, and shows what it says; its exit code."""
    from orchestrator import jobs

    head = jobs.connect(at)
    run, root = run_and_root(head, own)
    code, text = jobs.run_command(head, run, root, command, arguments, timeout_s)
    if code == Exit.MISTAKE:
        raise ConfigError(["its job said nothing", *text.strip().splitlines()][-1].removeprefix(f"{command}: "))
    print(text.rstrip())
    if code is None:
        print(f"{command}: no answer from the head of {at} within {timeout_s:.0f} s")
    return Exit.GAVE_UP if code is None else code
