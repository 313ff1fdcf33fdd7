"""What a run directory tells of a run, in the form the report page draws it. Reads only; trusts no value."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.page.timeline import Stretch, stretches
from orchestrator.record import rundir
from orchestrator.record.jsonfile import read_object
from orchestrator.recovery.incident import Incident

ENDS = {"finish": "finished", "stop": "stopped", "give_up": "gave up", "refuse": "refused"}


class Row(NamedTuple):
    """A line of metrics.jsonl; NaN where it says nothing that can be drawn."""

    step: int
    attempt: int
    loss: float
    bits_per_byte: float
    tokens_per_s: float
    step_s: float
    time: float
    ok: bool


class Eval(NamedTuple):
    step: int
    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class Controller:
    """The life of one controller, from its first sign to its last."""

    began: float
    ended: float
    end: str  # finished, stopped, gave up, refused, running, died
    stretches: list[Stretch]


@dataclass(frozen=True)
class History:
    manifest: rundir.Manifest
    state: str
    rows: list[Row]  # as written: a step done again appears again
    events: list[dict[str, Any]]
    evals: list[Eval]  # by step, the last of each
    controllers: list[Controller]
    incidents: list[Incident]
    goodput: dict[str, Any]  # empty where there is none yet


def number(value: Any) -> float:
    """NaN for anything that is not a finite number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def whole(value: Any) -> int:
    found = number(value)
    return 0 if math.isnan(found) else int(found)


def read(folder: Path, state: str, now: float) -> History:
    """state: as launch.status calls it. now: time.time(), up to which a running controller is known to live."""
    manifest = rundir.read_manifest(folder)
    rows = read_rows(folder / "metrics.jsonl")
    events = [
        e for e in rundir.read_lines(folder / "events.jsonl") if isinstance(e, dict) and number(e.get("time")) > 0
    ]
    goodput = read_object(folder / "goodput.json") or {}
    incidents = read_incidents(goodput, events)
    told = [e for e in events if e.get("event") == "eval"]
    evals = {e.step: e for e in (Eval(whole(t.get("step")), number(t.get("loss")), bits(t)) for t in told)}
    controllers = lives(manifest, rows, events, incidents, now if state == "running" else None)
    return History(manifest, state, rows, events, [evals[s] for s in sorted(evals)], controllers, incidents, goodput)


def bits(row: dict[str, Any]) -> float:
    return number(row.get("bits_per_byte"))


def read_rows(path: Path) -> list[Row]:
    found = []
    for row in rundir.read_lines(path):
        if not isinstance(row, dict) or math.isnan(number(row.get("step"))):
            continue
        ok = row.get("ok", 1.0) != 0
        attempt, loss, speed = whole(row.get("attempt")), number(row.get("loss")), number(row.get("tokens_per_s"))
        step_s, when = number(row.get("step_s")), number(row.get("time"))
        found.append(Row(int(row["step"]), attempt, loss, bits(row), speed, step_s, when, ok))
    return found


def read_incidents(goodput: dict[str, Any], events: Sequence[dict[str, Any]]) -> list[Incident]:
    """Those of goodput.json, and the failures of events.jsonl that are not among them (older runs)."""
    known = {field.name for field in fields(Incident)}
    empty = {"time": 0.0, "attempt": 0, "outcome": "", "rank": None, "step": 0, "evidence": ""}
    listed = goodput.get("incidents")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    found = [Incident(**(empty | {key: row[key] for key in row.keys() & known})) for row in rows]
    there = {(one.attempt, one.step) for one in found}
    for index, event in enumerate(events):
        if event.get("event") != "failure" or (event.get("attempt"), event.get("step")) in there:
            continue
        detect_s = number(event.get("detect_s"))
        took = 0.0 if math.isnan(detect_s) else detect_s
        told = {key: event.get(key, empty[key]) for key in ("attempt", "outcome", "rank", "step", "evidence")}
        then = next((e for e in events[index + 1 :] if e.get("event") in ("decision", "failure")), {})
        decision = f"{then['decision']}: {then.get('reason', '')}" if "decision" in then else ""
        found.append(Incident(event["time"] - took, **told, decision=decision, detect_s=took))
    return sorted(found, key=lambda one: (one.attempt, number(one.time)))


def lives(
    manifest: rundir.Manifest,
    rows: Sequence[Row],
    events: Sequence[dict[str, Any]],
    incidents: Sequence[Incident],
    now: float | None,
) -> list[Controller]:
    """Splits what happened by the commands that worked on the run; one that left no event is passed over."""
    starts = [attempt.time for attempt in manifest.attempts] or [manifest.created]
    shares: list[list[dict[str, Any]]] = [[] for _ in starts]
    stepped: list[list[Row]] = [[] for _ in starts]
    for event in events:
        shares[max(0, bisect.bisect_right(starts, event["time"]) - 1)].append(event)
    for row in rows:
        if row.time > 0:
            stepped[max(0, bisect.bisect_right(starts, row.time) - 1)].append(row)
    found, newest, last = [], 0, max((i for i, share in enumerate(shares) if share), default=0)
    for index, (share, own) in enumerate(zip(shares, stepped, strict=True)):
        if not share:
            continue
        began = share[0]["time"]
        ended = max(began, *(e["time"] for e in share), *(row.time for row in own))
        end = "gave up" if share[-1].get("decision") == "GiveUp" else ENDS.get(str(share[-1].get("event")), "died")
        if now is not None and index == last:
            ended, end = max(ended, now), "running"
        again, newest = replays(own, newest)
        found.append(Controller(began, ended, end, stretches(began, ended, share, again, incidents)))
    return found


def replays(rows: Sequence[Row], newest: int) -> tuple[list[tuple[float, float]], int]:
    """Spans of time in which steps were done again, joined; and the newest step after them."""
    spans: list[tuple[float, float]] = []
    for row in rows:
        if row.step <= newest and row.step_s > 0:
            begin = row.time - row.step_s
            if spans and begin - spans[-1][1] < row.step_s:
                begin = spans.pop()[0]
            spans.append((begin, row.time))
        newest = max(newest, row.step)
    return spans, newest
