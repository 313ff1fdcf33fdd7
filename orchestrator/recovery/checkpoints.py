"""Which checkpoint a run goes on from. Fails closed: a run that ever committed one never starts from step 0 again."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma.config import ConfigError
from orchestrator.record import rundir

UNREADABLE = ".unreadable-"  # in the name of a checkpoint that was set aside: STEP.unreadable-ATTEMPT
COMMIT = b'"commit"'


class LostError(Exception):
    """What was committed is not there, or nobody can know whether anything was. One line."""


def newest(folder: Path) -> int | None:
    """The step of the checkpoint to go on from; None for a run that has never committed one. Raises LostError.

    Hosts run ahead of the controller: where it died, a checkpoint may lie beyond the last step that it wrote down. An
    earlier one is taken then, so that every step has its line; the steps done again are the same to the bit.
    """
    found, place = rundir.committed(folder), folder / "checkpoints"
    kept = setting(folder, "keep_last") or 1
    expected, unreadable = history(rundir.events(folder), kept)
    unreadable |= {int(path.name.partition(".")[0]) for path in unreadable_paths(place)}
    if expected and (not found or found[-1] < max(expected)):
        raise LostError(f"{place / str(max(expected))} was committed and is gone; {offer(folder, found)}")
    if found:
        reported = max(rundir.metrics(folder), default=0)
        return max([step for step in found if step <= reported] or found)
    if unreadable:
        steps = ", ".join(map(str, sorted(unreadable)))
        raise LostError(f"of its checkpoints in {place} (step {steps}) none can be read; {offer(folder, found)}")
    if why := doubt(folder):
        raise LostError(f"no checkpoint is in {place}, and {why}; {offer(folder, found)}")
    return None


def setting(folder: Path, key: str) -> int:
    """The run's checkpoint.KEY; 0 where its manifest does not have it."""
    with contextlib.suppress(ConfigError, KeyError, TypeError, ValueError):
        return int(rundir.read_manifest(folder).config["checkpoint"][key])
    return 0


def resumable(folder: Path) -> int | None:
    """The same for a command, before anything is started. Raises ConfigError."""
    try:
        return newest(folder)
    except LostError as lost:
        raise ConfigError(f"run={folder.name}: {lost}") from lost


def history(events: Iterable[Mapping[str, Any]], kept: int) -> tuple[set[int], set[int]]:
    """The steps of the `kept` newest commits that must be on disk; of all commits, those set aside unreadable. Pure.

    Steps beyond one that the run went back to are in neither: they left the run's history.
    """
    commits: list[int] = []
    unreadable: set[int] = set()
    for event in events:
        name, step = event.get("event"), event.get("step")
        if name not in ("commit", "set_aside") or not isinstance(step, int):
            continue
        if name == "commit" or "path" not in event:
            commits = [earlier for earlier in commits if earlier != step] + [step] * (name == "commit")
            unreadable.discard(step)
        else:
            unreadable.add(step)
    return set(commits[-kept:]) - unreadable, unreadable


def unreadable_paths(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if UNREADABLE in path.name and path.name.partition(".")[0].isdigit()]


def offer(folder: Path, found: list[int]) -> str:
    """What the user can do about it."""
    refused = "the run does not start from step 0 by itself; put it back"
    return f"{refused}, or fork the run: launch.train from={folder}@{found[-1]}" if found else refused


def doubt(folder: Path) -> str:
    """Why the events cannot be trusted when they speak of no commit; nothing where they can."""
    path, steps = folder / "events.jsonl", rundir.metrics(folder)
    events = rundir.events(folder)
    worked = bool(steps) or (folder / "goodput.json").exists() or any((folder / "logs").glob("attempt-*"))
    if not worked:
        return ""
    if not events:
        return f"{path}, which would say whether any was committed, is gone or empty, though the run has worked"
    if damaged(path, len(events)):
        return f"{path}, which would say whether any was committed, is damaged"
    newest_attempt = max((row.get("attempt") or 0 for row in steps.values()), default=0)
    if newest_attempt > max(event.get("attempt", 0) for event in events):
        return f"{path} ends before step {max(steps)} of metrics.jsonl"
    every = setting(folder, "every")
    if every and max(steps, default=0) >= 2 * every and not save_was_tried(events):
        return f"{path} speaks of no save in {max(steps)} steps of checkpoint.every={every}"
    return ""


def save_was_tried(events: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a save was tried at least."""
    return any(event.get("event") in ("save", "save_failed", "commit", "set_aside") for event in events)


def damaged(path: Path, readable: int) -> bool:
    """Whether lines are lost. A line cut short by a killed writer is not lost, unless it was a commit."""
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    unfinished = [line for line in lines if line.startswith(b"{") and not line.endswith(b"}") and COMMIT not in line]
    return len(lines) - len(unfinished) > readable
