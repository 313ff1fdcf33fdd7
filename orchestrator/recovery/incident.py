"""One failure of a run, from its cause to the step that made up for it; and the page left when a run gives up."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHOWN = 12  # incidents on the page


@dataclass(frozen=True)
class Incident:
    """Seconds are None while they are not known: a run that gave up never caught up."""

    time: float  # time.time() at which the cause struck, as well as it is known
    attempt: int
    outcome: str
    rank: int | None
    step: int  # steps done when it struck
    evidence: str
    decision: str = ""
    source: str | None = None  # what was restored: memory, disk, start
    steps_lost: int | None = None  # done before, to be done again
    detect_s: float | None = None
    restart_s: float | None = None  # from its detection until all hosts stood ready
    catch_up_s: float | None = None  # from then until the first step never done before


def as_rows(incidents: Sequence[Incident]) -> list[dict[str, Any]]:
    return [
        {key: round(value, 4) if isinstance(value, float) and key != "time" else value for key, value in row.items()}
        for row in map(asdict, incidents)
    ]


def page(run_id: str, reason: str, incidents: Sequence[Incident], story: str, folder: Path, resume: str) -> str:
    """What somebody who is woken up by it wants to know, on one page."""
    last = incidents[-1]
    lines = [
        f"run {run_id} gave up: {reason}",
        "",
        f"last failure   {last.outcome}, rank {last.rank}, attempt {last.attempt}, after step {last.step}",
        f"evidence       {last.evidence[:300]}",
        f"logs           {folder / 'logs'} (a file a host and attempt, and the story of each failure)",
        f"go on with     {resume}",
        "",
        f"failures ({len(incidents)}{f', the last {SHOWN}' if len(incidents) > SHOWN else ''}):",
        "  attempt  step     outcome        rank  lost  evidence",
    ]
    for one in incidents[-SHOWN:]:
        lost = "-" if one.steps_lost is None else one.steps_lost
        evidence = " ".join(one.evidence.split())[:70]
        lines.append(f"  {one.attempt:<8} {one.step:<8} {one.outcome:<14} {one.rank!s:<5} {lost!s:<5} {evidence}")
    return "\n".join([*lines, "", "the last failure's story:", "", *story.splitlines()[:60]]) + "\n"
