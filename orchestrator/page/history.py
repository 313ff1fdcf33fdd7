"""What a run directory holds of a run, read for the report page. Writes nothing; trusts no value."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.page.timeline import Stretch, stretches
from orchestrator.record import rundir
from orchestrator.record.jsonfile import read_object
from orchestrator.recovery.incident import Incident

ENDS = {"finish": "finished", "stop": "stopped", "give_up": "gave up", "refuse": "refused"}
LARGEST = 1e100


class Row(NamedTuple):
    """A line of metrics.jsonl; NaN where it says nothing that can be drawn."""

    step: int
    attempt: int
    loss: float
    bits_per_byte: float
    grad_norm: float
    learning_rate: float
    tokens_per_s: float
    mfu: float
    step_s: float
    time: float
    ok: bool


MEASURED = Row._fields[2:-1]


class Served(NamedTuple):
    """What a server did in a second; NaN where it says nothing."""

    tokens: float  # so far
    tokens_per_s: float
    first_token_s: float
    between_tokens_s: float


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
    folder: str  # its name
    manifest: rundir.Manifest
    state: str
    rows: list[Row]  # as written: a step done again appears again
    events: list[dict[str, Any]]
    evals: list[Eval]  # by step, the last of each
    controllers: list[Controller]
    incidents: list[Incident]
    goodput: dict[str, Any]  # empty where there is none yet
    served: list[Served]  # of a server


def number(value: Any) -> float:
    """NaN for anything that is not a finite number, or too large to be one that was measured."""
    sound = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return float(value) if sound else math.nan


def whole(value: Any) -> int:
    found = number(value)
    return 0 if math.isnan(found) else int(found)


def read(folder: Path, state: str, now: float) -> History:
    """state: as launch.status calls it. now: time.time(), up to which a running controller is known to live."""
    manifest = checked(rundir.read_manifest(folder))
    rows = read_rows(folder / "metrics.jsonl")
    lines = [e for e in rundir.read_lines(folder / "events.jsonl") if isinstance(e, dict)]
    events = [e for e in lines if number(e.get("time")) > 0 and isinstance(e.get("event"), str)]
    goodput = read_object(folder / "goodput.json") or {}
    incidents = read_incidents(goodput, events)
    found = [e for e in events if e["event"] == "eval"]
    losses = [Eval(whole(e.get("step")), number(e.get("loss")), number(e.get("bits_per_byte"))) for e in found]
    evals = {one.step: one for one in losses}
    controllers = lives(manifest, rows, events, incidents, now if state == "running" else None)
    served = read_served(folder / "metrics.jsonl") if manifest.config.get("serve") else []
    kept = [evals[s] for s in sorted(evals)]
    return History(folder.name, manifest, state, rows, events, kept, controllers, incidents, goodput, served)


def checked(manifest: rundir.Manifest) -> rundir.Manifest:
    """With nothing where a damaged manifest holds something else than it should."""
    found = {name: getattr(manifest, name) for name in ("config", "mesh", "versions")}
    tables: dict[str, Any] = {name: value if isinstance(value, dict) else {} for name, value in found.items()}
    attempts = [replace(one, time=number(one.time) if number(one.time) > 0 else 0.0) for one in manifest.attempts]
    return replace(manifest, created=number(manifest.created), attempts=attempts, **tables)


def read_served(path: Path) -> list[Served]:
    lines = [row for row in rundir.read_lines(path) if isinstance(row, dict)]
    return [Served(*(number(row.get(name)) for name in Served._fields)) for row in lines if "running" in row]


def read_rows(path: Path) -> list[Row]:
    found = []
    for row in rundir.read_lines(path):
        if not isinstance(row, dict) or math.isnan(number(row.get("step"))):
            continue
        values = {name: number(row.get(name)) for name in MEASURED}
        found.append(Row(int(row["step"]), whole(row.get("attempt")), **values, ok=row.get("ok", 1.0) != 0))
    return found


def read_incidents(goodput: dict[str, Any], events: Sequence[dict[str, Any]]) -> list[Incident]:
    """Those of goodput.json, and the failures of events.jsonl that are not among them (older runs)."""
    known = {field.name for field in fields(Incident)}
    listed = goodput.get("incidents")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    found = [incident({key: row[key] for key in row.keys() & known}) for row in rows]
    there = {(one.attempt, one.step) for one in found}
    for index, event in enumerate(events):
        if event["event"] != "failure" or (whole(event.get("attempt")), whole(event.get("step"))) in there:
            continue
        detect_s = number(event.get("detect_s"))
        took = 0.0 if math.isnan(detect_s) else detect_s
        facts = {key: event[key] for key in ("attempt", "outcome", "rank", "step", "evidence") if key in event}
        then = next((e for e in events[index + 1 :] if e["event"] in ("decision", "failure")), {})
        decision = f"{then['decision']}: {then.get('reason', '')}" if "decision" in then else ""
        found.append(incident(facts | {"time": event["time"] - took, "decision": decision, "detect_s": took}))
    return sorted(found, key=lambda one: (one.attempt, one.time))


def incident(facts: dict[str, Any]) -> Incident:
    """Texts may be anything; what is counted or measured is a number."""
    empty: dict[str, Any] = {"time": 0.0, "attempt": 0, "outcome": "", "rank": None, "step": 0, "evidence": ""}
    numbers = {key: whole(facts.get(key)) for key in ("attempt", "step")}
    spans = {key: number(facts.get(key)) for key in ("time", "detect_s", "restart_s", "catch_up_s")}
    known = {key: None if math.isnan(value) else value for key, value in spans.items()}
    return Incident(**(empty | facts | numbers | known | {"time": known["time"] or 0.0}))


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
