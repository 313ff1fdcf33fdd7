"""What a controller was doing, and when: its phases, refined by what the hosts told of them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from orchestrator.recovery.incident import Incident

# Runs that tell no phases: what begins with an event.
BEGINS = {
    "reserve": "start",
    "initialise": "step",
    "restore": "step",
    "failure": "down",
    "decision": "reserve",
}
LONGEST_S = 1e10  # what is more than three centuries is damage


class Stretch(NamedTuple):
    """One bucket of the ledger, from one time.time() to another."""

    start: float
    end: float
    name: str
    attempt: int


class Span(NamedTuple):
    start: float
    end: float


def stretches(
    began: float,
    ended: float,
    events: Sequence[dict[str, Any]],
    replays: Iterable[tuple[float, float]],
    incidents: Sequence[Incident],
) -> list[Stretch]:
    """One controller's life without holes. replays: when steps were done again."""
    found = phases(began, ended, events)
    found = laid_over(found, "replay", replays, {"step"})
    for name in ("eval", "save"):
        told = (e for e in events if e.get("event") == name)
        found = laid_over(found, name, ((e["time"] - seconds(e), e["time"]) for e in told), {"step", "replay"})
    struck = ((one.time, one.time + (one.detect_s or 0.0)) for one in incidents if began <= one.time <= ended)
    found = laid_over(found, "detect", struck, {"step", "replay"})
    # Inside `start`: what the hosts did before they stood ready, its order as they do it.
    for name, after in (("restore", ()), ("compile", ("restore",)), ("data", ("restore", "compile"))):
        found = laid_over(found, name, open_spans(events, name, after), {"start"})
    return found


def seconds(event: dict[str, Any], key: str = "duration_s") -> float:
    value = event.get(key)
    return float(value) if isinstance(value, int | float) and 0 <= value <= LONGEST_S else 0.0


def open_spans(events: Sequence[dict[str, Any]], name: str, after: Sequence[str]) -> list[tuple[float, float]]:
    """When the hosts did `name`, which ended before they did `after`, which ended when they stood ready."""
    found = []
    for event in events:
        took = event.get("seconds")
        if isinstance(took, dict):
            end = event["time"] - sum(seconds(took, later) for later in after)
            found.append((end - seconds(took, name), end))
    return found


def phases(began: float, ended: float, events: Sequence[dict[str, Any]]) -> list[Stretch]:
    """Each phase lasts until the next; what is not told is `other`. Clocks that were set back make no negative time."""
    told = [(e["time"], str(e.get("name")), e.get("attempt", 0)) for e in events if e.get("event") == "phase"]
    if not told:
        told = [(began, "reserve", 1)]
        told += [(e["time"], BEGINS[e["event"]], e.get("attempt", 0)) for e in events if e.get("event") in BEGINS]
    found, at, name, attempt = [], began, "other", 0
    for time, following, number in [*told, (ended, "", 0)]:
        time = min(max(time, at), ended)
        if time > at:
            found.append(Stretch(at, time, name, attempt))
        # The line of a phase `reserve` comes just before its attempt is counted.
        at, name, attempt = time, following, max(1, number if isinstance(number, int) else 0)
    return found


def joined(spans: Iterable[tuple[float, float]]) -> list[Span]:
    """In order, overlapping ones made one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if found and start <= found[-1].end:
            found[-1] = Span(found[-1].start, max(found[-1].end, end))
        else:
            found.append(Span(start, end))
    return found


def laid_over(
    under: Sequence[Stretch], name: str, spans: Iterable[tuple[float, float]], over: set[str]
) -> list[Stretch]:
    """Where a span meets a stretch whose name is in `over`, that time is called `name`."""
    found: list[Stretch] = []
    cuts, index = joined(spans), 0
    for stretch in under:
        while index < len(cuts) and cuts[index].end <= stretch.start:
            index += 1
        at, ahead = stretch.start, index
        while stretch.name in over and ahead < len(cuts) and cuts[ahead].start < stretch.end:
            start, end = max(cuts[ahead].start, at), min(cuts[ahead].end, stretch.end)
            if start > at:
                found.append(stretch._replace(start=at, end=start))
            found.append(Stretch(start, end, name, stretch.attempt))
            at, ahead = end, ahead + 1
        if at < stretch.end:
            found.append(stretch._replace(start=at))
    return found
