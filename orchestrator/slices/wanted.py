"""What is wanted of a provider, what is there, and what to do about the difference. Pure."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    WAITING = "waiting"  # asked for
    READY = "ready"
    LOST = "lost"  # failed, preempted, lapsed: nothing comes of it any more, but it must be given back
    GOING = "going"  # being given back


@dataclass(frozen=True)
class Wanted:
    owner: str  # whose they are: a run's id, or cluster.name
    slice: str
    topology: str
    count: int
    zones: tuple[str, ...]  # in order of preference
    patience_s: float = 600.0  # for a zone without capacity, before the next is asked
    slices: int = 1  # of each request
    named: bool = False  # they are cluster.name's: other runs may count on them as they are


@dataclass(frozen=True)
class Request:
    """One slice, or several that are asked for as one, as the provider tells of it."""

    name: str
    zone: str
    owner: str
    state: State
    slice: str
    topology: str
    since: float  # time.time() at which it was asked for
    why: str = ""  # it is lost, or waits
    capacity: str = "on-demand"
    slices: int = 1
    hopeless: bool = False  # it waits for what will not come, why says
    found: bool = False  # it waits no more for capacity: it is being made


@dataclass(frozen=True)
class Create:
    name: str
    zone: str


@dataclass(frozen=True)
class Delete:
    request: Request
    why: str


def reconcile(
    wanted: Wanted, there: Sequence[Request], turned_down: Mapping[str, float], bad: Mapping[str, str], now: float
) -> list[Create | Delete]:
    """Brings what is there nearer to what is wanted; nothing of another owner is touched.

    turned_down: until when a zone is not asked. bad: slices to be replaced, and why. What is being given back still
    counts against the quota: its successor is asked for once it is gone.
    """
    mine = sorted((r for r in there if r.owner == wanted.owner), key=lambda r: (r.since, r.name))
    open_zones = [zone for zone in wanted.zones if turned_down.get(zone, 0.0) <= now]
    back = {r.name: Delete(r, why) for r in mine if (why := fault(r, wanted, open_zones, bad, now))}
    live = [r for r in mine if r.state is not State.GOING and r.name not in back]
    for extra in sorted(live, key=lambda r: r.state is State.READY)[: max(0, len(live) - wanted.count)]:
        back[extra.name] = Delete(extra, "is not wanted")
    missing = wanted.count - sum(r.state is State.GOING or r.name in back or r in live for r in mine)
    here = {r.zone for r in live}  # slices of one run lie together
    zone = next((zone for zone in open_zones if zone in here or not here), None)
    asked = [Create(request_name(wanted.owner, now, i), zone) for i in range(missing)] if zone else []
    return [*(done for done in back.values() if done.request.state is not State.GOING), *asked]


def unlike(wanted: Wanted, there: Sequence[Request]) -> str:
    """Why slices that are kept under a name are not those that are wanted: they are not replaced by the way."""
    mine = [r for r in there if r.owner == wanted.owner and r.state in (State.READY, State.WAITING)]
    kinds = sorted({f"{r.slices} x {r.slice} of {r.topology}" for r in mine})
    wants = f"{wanted.slices} x {wanted.slice} of {wanted.topology}"
    if not wanted.named or not mine or (kinds == [wants] and len(mine) <= wanted.count):
        return ""
    held = f"{len(mine)} x {kinds[0]}" if wanted.count > 1 or len(mine) > 1 else ", ".join(kinds)
    return (
        f"cluster.name={wanted.owner}: holds {held}, wanted is {wanted.count} x {wants}; give cluster.slice and"
        " cluster.num_slices as they are there, or launch.cluster down first"
    )


def fault(r: Request, wanted: Wanted, open_zones: Collection[str], bad: Mapping[str, str], now: float) -> str:
    """Why a request is of no use; nothing where it is."""
    if r.state is State.GOING:
        return ""
    if r.state is State.LOST:
        return r.why or "is lost"
    if (r.slice, r.topology, r.slices) != (wanted.slice, wanted.topology, wanted.slices):
        wants = f"wanted is {wanted.slices} x {wanted.slice} of {wanted.topology}"
        return f"is {r.slices} x {r.slice} of {r.topology}, {wants}"
    waited_s = now - r.since
    if (
        r.state is State.WAITING
        and not r.found
        and waited_s > wanted.patience_s
        and any(zone != r.zone for zone in open_zones)
    ):
        return f"no capacity in {r.zone} within {waited_s:.0f} s"
    return bad.get(r.name, "")


def owner_label(owner: str) -> str:
    """An owner's name as a label's value, or part of a resource's name: lower case, and no two owners alike."""
    plain = re.sub(r"[^a-z0-9]+", "-", owner.lower()).strip("-")
    if plain == owner and len(plain) <= 30:
        return plain
    return f"{plain[:23].strip('-')}-{hashlib.sha256(owner.encode()).hexdigest()[:6]}"


def request_name(owner: str, now: float, index: int) -> str:
    """Never used before, so that what is still being given back is in nobody's way."""
    return f"gemma-{owner_label(owner)}-{int(now * 1000):x}-{index}"
