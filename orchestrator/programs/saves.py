"""What is known of the saves of an attempt: on their way, whole on disk, failed and to be tried again."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gemma.messages import SaveFailed
from orchestrator.programs.window import backoff_s, warned
from orchestrator.record import rundir
from orchestrator.record.report import Report


@dataclass
class Saves:
    newest: int  # step on disk or on its way there
    begun_at: float = field(default_factory=time.monotonic)  # the newest
    uncommitted: dict[int, float] = field(default_factory=dict)  # begun, not seen whole on disk: since when
    failures: int = 0  # since the last commit
    problem: str = ""  # of the newest of them
    until: float = math.inf  # time.monotonic() after which it is not tried any more
    meanwhile: str = "training goes on"
    again_at: float = 0.0  # after a failure, the earliest time of the next try


def note_begun(saves: Saves, step: int) -> None:
    saves.newest, saves.begun_at = step, time.monotonic()


def note_failures(
    saves: Saves, report: Report, failures: Iterable[SaveFailed | None], on_the_way: Sequence[int]
) -> None:
    """What hosts tell of saves that had begun; several may tell the same.

    on_the_way: steps whose save the hosts have not answered.
    """
    for one in failures:
        if one and one.step in saves.uncommitted and one.step not in rundir.committed(report.folder):
            fail(saves, report, one.step, one.problem, on_the_way)


def announce_commits(saves: Saves, report: Report, on_the_way: Sequence[int], late_s: float) -> None:
    """Announces what is whole on disk, and nothing else. What is not after late_s has failed."""
    if not saves.uncommitted:
        return
    committed, now = rundir.committed(report.folder), time.monotonic()
    for step, since in sorted(saves.uncommitted.items()):
        if step in committed:
            commit(saves, report, step)
        elif step < max(committed, default=0):
            del saves.uncommitted[step]  # it was removed for later ones before it was seen
        elif now - since > late_s:
            fail(saves, report, step, f"not whole on disk after {late_s:.0f} s", on_the_way)


def commit(saves: Saves, report: Report, step: int) -> None:
    del saves.uncommitted[step]
    report.event("commit", step)
    if saves.failures:
        report.screen.say(f"step {step} is saved; {saves.failures} tries before had failed")
        saves.failures, saves.again_at = 0, 0.0


def fail(saves: Saves, report: Report, step: int, problem: str, on_the_way: Sequence[int]) -> None:
    """Goes back to what is on disk, and waits before it is tried again. The user is warned now and then."""
    saves.uncommitted.pop(step, None)
    saves.failures += 1
    saves.problem = problem
    now = time.monotonic()
    wait_s = min(backoff_s(saves.failures), max(0.0, saves.until - now) / 2)  # the last tries need time too
    saves.again_at = now + wait_s
    committed = max(rundir.committed(report.folder), default=0)
    saves.newest = max([committed, *saves.uncommitted, *on_the_way])
    report.event("save_failed", step, problem=problem, again_s=round(wait_s, 1))
    if warned(saves.failures):
        times = f" {saves.failures} times" if saves.failures > 1 else ""
        kept = f"step {committed} is kept" if committed else "nothing is saved yet"
        report.screen.say(
            f"WARNING: saving failed{times}, at step {step}: {problem}; {kept}, {saves.meanwhile},"
            f" the next try is in {wait_s:.0f} s"
        )


def went_back(saves: Saves, committed: Sequence[int], step: int) -> None:
    """The hosts are back at an earlier step and write nothing: only saves on disk count."""
    saves.uncommitted.clear()
    saves.newest = max([saved for saved in committed if saved <= step], default=0)
