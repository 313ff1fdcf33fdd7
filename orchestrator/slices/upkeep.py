"""Keeps what a provider gives as it is wanted: polls and acts, in a thread beside the run."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from gemma.config import ConfigError
from orchestrator.interrupt import signals_wait
from orchestrator.slices.lease import Lease
from orchestrator.slices.wanted import Create, Delete, Request, State, Wanted, reconcile, unlike

if TYPE_CHECKING:
    from orchestrator.hosts.placement import Spot

WORST_WAIT_S = 60.0  # between two polls while the provider is in trouble
ANSWER_TIMEOUT_S = 20.0  # for the provider, before anything is asked of it
CLEAR_TIMEOUT_S = 300.0
HEAD_SILENT_S = 15.0
PATIENT_LOOKS = 3  # that find nothing before it is believed: what was asked for a moment ago may not be shown yet


class RefusedError(Exception):
    """The provider did not do as asked. stock-out, quota: not there, not now. forbidden: never, as it stands.
    trouble: of its own; the next try may work. unreachable: nothing answers at its address."""

    def __init__(self, kind: Literal["stock-out", "quota", "forbidden", "trouble", "unreachable"], message: str):
        super().__init__(message)
        self.kind = kind


class NoSlicesError(Exception):
    """The provider will not give what is wanted."""


@dataclass(frozen=True)
class Provider:
    """Its verbs; each raises RefusedError."""

    list_requests: Callable[[], Sequence[Request]]  # at everybody's
    create: Callable[[Create], None]
    delete: Callable[[Request], None]
    joined: Callable[[], set[str]]  # the slices whose hosts are all in the Ray cluster
    kind: str = "gcp"  # as in cluster=gcp
    replace: Callable[["Spot"], str] | None = None  # has a bad host replaced, and says how; else its slice goes


@dataclass
class Upkeep:
    """What is remembered between polls, and the news for the run."""

    wanted: Wanted
    provider: Provider
    poll_s: float
    rejoin_s: float
    turned_down: dict[str, float] = field(default_factory=dict)  # zone: until then
    quotas: dict[str, str] = field(default_factory=dict)  # zone: what it said
    bad: dict[str, str] = field(default_factory=dict)  # slices to be replaced, and why
    discarded: deque[tuple["Spot", str]] = field(default_factory=deque)  # by the run, not yet seen to
    unfit: dict[str, tuple["Spot", str]] = field(default_factory=dict)  # by node id: hosts that are to be replaced
    replaced: set[str] = field(default_factory=set)  # by node id
    absent_since: dict[str, float] = field(default_factory=dict)  # ready, and not in the Ray cluster
    states: dict[str, State] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why they are in that state
    news: deque[tuple[str, str]] = field(default_factory=deque)  # slice or zone, what happened
    asked: bool = False  # something may be there
    unseen: set[str] = field(default_factory=set)  # asked for, and not listed by a poll yet
    had: bool = False  # all that is wanted was there once: no refusal is final any more
    head_answers: Callable[[], bool] = lambda: True  # whether the head of the Ray cluster does
    silent_since: float | None = None  # time.monotonic() at which it did not any more
    keep: bool = False  # when the run ends
    failed: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)


def step(upkeep: Upkeep) -> None:
    """One poll, and what follows from it. Raises RefusedError in trouble, ConfigError or NoSlicesError for good."""
    now = time.time()
    there = upkeep.provider.list_requests()
    if not upkeep.had and (said := unlike(upkeep.wanted, there)):
        raise ConfigError(said)
    note(upkeep, there, now)
    for r in there:
        if r.owner == upkeep.wanted.owner and r.hopeless and not upkeep.had:
            raise NoSlicesError(f"{r.name}: {r.why}")
    for action in reconcile(upkeep.wanted, there, upkeep.turned_down, upkeep.bad, now):
        if upkeep.ended.is_set():
            return
        if isinstance(action, Delete):
            upkeep.news.append((action.request.name, f"given back: {action.why}"))
            if action.request.state is State.WAITING and now - action.request.since > upkeep.wanted.patience_s:
                turn_down(upkeep, action.request.zone, now, len(upkeep.wanted.zones))  # each other one has its turn
            upkeep.provider.delete(action.request)
        else:
            create_slice(upkeep, action, now)
    if upkeep.provider.replace is not None:
        replace_unfit(upkeep, upkeep.provider.replace)


def replace_unfit(upkeep: Upkeep, replace: Callable[["Spot"], str]) -> None:
    """What cannot be done now is done at another poll: the rest goes on meanwhile."""
    for node, (spot, why) in list(upkeep.unfit.items()):
        if upkeep.ended.is_set():
            return
        name = f"host {spot.ip}"
        try:
            how = replace(spot)
        except RefusedError as refused:
            if upkeep.reasons.get(node) != str(refused):
                upkeep.reasons[node] = str(refused)
                upkeep.news.append((name, f"cannot be replaced now: {refused}"))
            continue
        upkeep.replaced.add(node)
        del upkeep.unfit[node]
        if how or node in upkeep.reasons:  # where an answer was lost, it may have been done all the same
            upkeep.news.append((name, f"{how or 'is gone by now'}: {why}"))


def create_slice(upkeep: Upkeep, action: Create, now: float) -> None:
    upkeep.asked = True
    upkeep.unseen.add(action.name)
    try:
        upkeep.provider.create(action)
        upkeep.news.append((action.name, f"asked for in {action.zone}"))
    except RefusedError as refused:
        if refused.kind in ("trouble", "unreachable"):
            raise  # the next poll shows whether it came about all the same
        upkeep.unseen.discard(action.name)
        said = f"{action.zone}: {refused}"
        upkeep.news.append((action.zone, f"{refused.kind}: {refused}"))
        if refused.kind == "forbidden" and not upkeep.had:
            raise (ConfigError if not upkeep.states else NoSlicesError)(said) from refused
        turn_down(upkeep, action.zone, now)
        if refused.kind == "quota":
            lacks_quota(upkeep, action.zone, str(refused), now)


def lacks_quota(upkeep: Upkeep, zone: str, said: str, now: float) -> None:
    """Raises NoSlicesError where all zones said so of late, and the run has never had its slices: after a loss the
    provider may count what is gone for a while.
    """
    upkeep.quotas[zone] = said
    zones = upkeep.wanted.zones
    if not upkeep.had and all(zone in upkeep.quotas and upkeep.turned_down.get(zone, 0.0) > now for zone in zones):
        said = "; ".join(f"{zone}: {upkeep.quotas[zone]}" for zone in zones)
        raise NoSlicesError(f"no zone's quota allows a {upkeep.wanted.slice}: {said}")


def turn_down(upkeep: Upkeep, zone: str, now: float, turns: int = 1) -> None:
    upkeep.turned_down[zone] = now + turns * upkeep.wanted.patience_s


def note(upkeep: Upkeep, there: Sequence[Request], now: float) -> None:
    """What has changed since the last poll."""
    mine = [r for r in there if r.owner == upkeep.wanted.owner]
    for r in mine:
        if upkeep.states.get(r.name) is not r.state or (r.why and upkeep.reasons.get(r.name) != r.why):
            upkeep.news.append((r.name, f"{r.state.value} in {r.zone}" + (f": {r.why}" if r.why else "")))
            if r.state is State.LOST and upkeep.states.get(r.name) in (None, State.WAITING):
                turn_down(upkeep, r.zone, now)  # it never came to be
                if "quota" in r.why.lower():
                    lacks_quota(upkeep, r.zone, r.why, now)
    upkeep.states = {r.name: r.state for r in mine}
    upkeep.reasons |= {r.name: r.why for r in mine if r.why}
    upkeep.asked = upkeep.asked or bool(mine)  # an earlier controller did
    upkeep.unseen -= upkeep.states.keys()
    ready = {r.name for r in mine if r.state is State.READY}
    upkeep.had = upkeep.had or len(ready) >= upkeep.wanted.count > 0
    for r in mine:
        if r.state is not State.LOST:
            upkeep.quotas.pop(r.zone, None)
    absent = ready - upkeep.provider.joined() if ready else set()
    upkeep.absent_since = {name: upkeep.absent_since.get(name, now) for name in absent}
    for name, since in upkeep.absent_since.items():
        if now - since > upkeep.rejoin_s:
            upkeep.bad[name] = f"its hosts are not in the Ray cluster after {now - since:.0f} s"
    while upkeep.discarded:
        spot, why = upkeep.discarded.popleft()
        if upkeep.provider.replace is None:
            upkeep.bad[spot.slice_name] = f"its host {spot.ip} (worker {spot.worker_id}): {why}"
        elif spot.node_id not in upkeep.replaced:
            upkeep.unfit[spot.node_id] = spot, why
    upkeep.bad = {name: why for name, why in upkeep.bad.items() if name in upkeep.states}


def discard(upkeep: Upkeep, spot: "Spot", why: str) -> None:
    """At the next poll a bad host is replaced, or its slice given back for another. Called from the run's thread."""
    upkeep.discarded.append((spot, why))


def loop(upkeep: Upkeep) -> None:
    wait_s = upkeep.poll_s
    while not upkeep.ended.wait(wait_s):
        try:
            watch_head(upkeep)
            if upkeep.silent_since is None:  # else asking who has joined would wait for the head, for ever
                step(upkeep)
            wait_s = upkeep.poll_s
        except RefusedError as trouble:
            wait_s = min(2 * wait_s, WORST_WAIT_S)
            upkeep.news.append(("provider", f"{trouble}; again in {wait_s:.0f} s"))
        except Exception as error:
            upkeep.failed = error
            return


def watch_head(upkeep: Upkeep) -> None:
    """Without its head a run is at an end, and Ray ends this process a minute later, whatever it is at: slices are
    given back before. Raises NoSlicesError.
    """
    now = time.monotonic()
    upkeep.silent_since = None if upkeep.head_answers() else upkeep.silent_since or now
    if upkeep.silent_since is not None and now - upkeep.silent_since > HEAD_SILENT_S:
        if not upkeep.keep:
            clear(upkeep.provider, upkeep.wanted.owner, upkeep.poll_s, lambda *news: upkeep.news.append(news))
        raise NoSlicesError(f"the head of the Ray cluster has not answered for {HEAD_SILENT_S:.0f} s")


def begin(upkeep: Upkeep) -> None:
    """The first step, not in the thread: what is wrong with the user's part is known before anything is waited for.
    Raises ConfigError and NoSlicesError.
    """
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            return step(upkeep)
        except RefusedError as refused:
            if upkeep.asked:
                return upkeep.news.append(("provider", str(refused)))
            if refused.kind != "trouble" or time.monotonic() > deadline:
                raise ConfigError(f"cluster={upkeep.provider.kind}: {refused}") from refused
        time.sleep(min(upkeep.poll_s, 1.0))


@contextmanager
def managed(upkeep: Upkeep, keep: bool, tell: Callable[[str, str], None]) -> Iterator[Lease]:
    """Its `repair` passes on the news and raises what ended the upkeep. At the end all is given back, unless `keep`."""

    def pass_on() -> None:
        with suppress(IndexError):  # somebody else has just passed it on
            while upkeep.news:
                tell(*upkeep.news.popleft())

    def check() -> None:
        pass_on()
        if upkeep.failed is not None:
            raise upkeep.failed

    def resize(count: int) -> None:
        upkeep.wanted = replace(upkeep.wanted, count=count)  # for the next poll

    upkeep.keep = keep
    thread = threading.Thread(target=loop, args=(upkeep,), name="upkeep", daemon=True)
    try:
        begin(upkeep)
        thread.start()
        give_back = partial(discard, upkeep)
        yield Lease(check, give_back, pass_on, lambda name: upkeep.states.get(name) is State.READY, resize=resize)
    finally:
        with signals_wait():  # an impatient user would leave slices behind that are paid for
            upkeep.ended.set()
            if thread.ident is not None:
                thread.join(CLEAR_TIMEOUT_S)
            pass_on()
            if upkeep.keep and upkeep.states:
                tell("slices", f"kept, and paid for: {', '.join(sorted(upkeep.states))}; launch.cluster down ends them")
            elif upkeep.asked and not upkeep.keep:
                clear(upkeep.provider, upkeep.wanted.owner, upkeep.poll_s, tell, patient=bool(upkeep.unseen))


def clear(
    provider: Provider, owner: str, poll_s: float, tell: Callable[[str, str], None], patient: bool = False
) -> list[Request]:
    """Gives back all that is an owner's, and returns once it is gone; gives what is left where that takes too long.

    patient: nothing is found several times before it is believed, as whoever asked may just have died.
    """
    deadline, left, nothing = time.monotonic() + CLEAR_TIMEOUT_S, list[Request](), 0
    while time.monotonic() < deadline:
        try:
            left = [r for r in provider.list_requests() if r.owner == owner]
            for request in (r for r in left if r.state is not State.GOING):
                tell(request.name, "given back: no longer wanted")
                provider.delete(request)
            nothing = 0 if left else nothing + 1
            if nothing >= (PATIENT_LOOKS if patient else 1):
                return []
        except RefusedError as trouble:
            tell("provider", str(trouble))
        time.sleep(min(poll_s, 1.0))
    names = ", ".join(r.name for r in left) or owner
    tell("provider", f"still not gone after {CLEAR_TIMEOUT_S:.0f} s: {names}; python -m launch.cluster down finds them")
    return left
