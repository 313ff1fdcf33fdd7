"""python -m launch.stop run=ID|latest: a run saves and stops, wherever it is driven."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from gemma.config import ConfigError
from launch import detached
from launch.command import arguments, main
from launch.status import state
from orchestrator.exit import Exit
from orchestrator.record import rundir

USAGE = f"""Stop a run: it finishes the steps in flight, saves and gives back its slices; launch.resume goes on with it.

  python -m launch.stop run=ID
  python -m launch.stop run=ID cluster.address=HOST:PORT     a detached run, from anywhere

  run       the run's id, or latest (required)
  run.root  where runs lie (default: runs)
  wait_s    for it to have stopped (default: 600); it stops later, too
{detached.USAGE}

Given again while a run stops, it stops at once.
Exit code 0 stopped, or was not running; 1 a mistake; 2 not stopped in time, or not saved."""

POLL_S = 0.1
ANSWER_S = 180.0  # for the command to begin where the run lies
ENDS_S = 20.0  # for a job to be over once the run has stopped


def work() -> int:
    own, rest = arguments({"run": "", "run.root": "runs", "wait_s": "600"} | detached.CLUSTER, USAGE)
    if rest:
        raise ConfigError(f"{rest[0].partition('=')[0]}: unknown key; allowed: {', '.join(own)}")
    if not own["run"]:
        raise ConfigError("run: missing; allowed is run=ID or run=latest")
    wait_s = seconds(own["wait_s"])
    if at := detached.dashboard(own):
        return stop_there(own, at, wait_s)
    return stop_here(rundir.find(own["run.root"], own["run"]), wait_s)


def seconds(text: str) -> float:
    """Raises ConfigError for what is not to be waited: nan would be for ever."""
    with contextlib.suppress(ValueError):
        if 0 <= (wait_s := float(text)) < float("inf"):
            return wait_s
    raise ConfigError(f"wait_s={text}: must be a number of seconds, 0 or more")


def stop_here(folder: Path, wait_s: float) -> int:
    """A run that a process of this machine drives."""
    if not rundir.is_locked(folder):
        print(f"run {folder.name}: is not running ({state(folder)})")
        return Exit.FINISHED
    pid = rundir.driver(folder)
    if pid is None and rundir.is_locked(folder):
        raise ConfigError(f"run={folder.name}: is driven on another machine, or by another user; stop it there")
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + wait_s
    while rundir.is_locked(folder):
        if time.monotonic() > deadline:
            print(f"run {folder.name}: has not stopped within wait_s={wait_s:g}; it goes on saving")
            return Exit.GAVE_UP
        time.sleep(POLL_S)
    ended = state(folder)
    print(f"run {folder.name}: {ended}, at step {max(rundir.committed(folder), default=0)}")
    return Exit.FINISHED if ended in ("stopped", "finished") else Exit.GAVE_UP


def stop_there(own: Mapping[str, str], at: str, wait_s: float) -> int:
    """One whose controller is a job: the same command is given on its machine, so that only the controller itself is
    asked. Ray would ask its helpers too, and wandb's dies of it.
    """
    from orchestrator import jobs

    head = jobs.connect(at)
    found = jobs.find(head, own["run"])
    if found.ended:
        print(f"run {found.run}: is not running ({found.state})")
        return Exit.FINISHED
    code, text = jobs.run_command(head, found.run, found.root, "stop", [f"wait_s={wait_s:g}"], wait_s + ANSWER_S)
    if code in (Exit.FINISHED, Exit.GAVE_UP):
        print(text.rstrip())
        if code == Exit.GAVE_UP or jobs.wait(head, found.id, ENDS_S):
            return code
    jobs.stop(head, found.id)  # it had not begun, or does not listen
    if not jobs.wait(head, found.id, wait_s):
        print(f"run {found.run}: its job {found.id} has not ended within wait_s={wait_s:g}")
        return Exit.GAVE_UP
    print(f"run {found.run}: its job is stopped")
    return Exit.FINISHED


if __name__ == "__main__":
    main("stop", work)
