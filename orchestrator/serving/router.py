"""The requests of all clients, between the HTTP server's thread and the threads that drive replicas' hosts.

A request outlives hosts: its tokens are kept here. What a replica had that is gone waits again, and whichever replica
takes it computes it again and goes on.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from gemma.batching import schedule
from gemma.batching.plans import Chosen, Limits, Sampling, Scored
from gemma.batching.schedule import Batch, News
from orchestrator.serving.metrics import Metrics, new_metrics

SERVED, JUDGE = 0, 1  # which model a request is for
LEAST_LOADED_S = 0.1  # for so long a request waits for the least loaded replica; then any with room takes it
MOST_WAITS = 10_000  # seconds that are kept of a measurement


@dataclass(frozen=True)
class Part:
    """What is new of a choice: tokens, or how it ended."""

    choice: int
    chosen: Chosen | None
    ended: str | None  # stop, length, or an error in words
    scored: Scored | None = None


@dataclass
class Request:
    """Of one client: a sequence for each choice. Its parts come in `parts`, on the HTTP server's thread."""

    sequences: tuple[schedule.Sequence, ...]
    parts: "asyncio.Queue[Part]"
    loop: asyncio.AbstractEventLoop
    model: int = SERVED
    came: float = field(default_factory=time.monotonic)


@dataclass
class Measured:
    """What came of requests, since it was last told."""

    plans: int = 0  # answered
    tokens: int = 0
    first_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_WAITS))  # to first tokens
    between_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_WAITS))  # between tokens

    def clear(self) -> None:
        self.plans = self.tokens = 0
        self.first_s.clear()
        self.between_s.clear()


@dataclass
class Replica:
    """Hosts that stand ready, with the sequences that they compute. Driven by a thread of its own."""

    batches: tuple[Batch, ...]  # of each model
    cancelled: deque[tuple[Batch, schedule.Sequence]] = field(default_factory=deque)  # and not taken out yet
    arrived: threading.Event = field(default_factory=threading.Event)  # something is to be taken
    draining: bool = False  # it takes nothing that others could
    drain_until: float = 0.0  # time.monotonic()
    put_back: int = 0  # sequences, as /metrics has it
    measured: Measured = field(default_factory=Measured)

    def held(self, model: int = SERVED) -> int:
        """Sequences that it has."""
        return len(self.batches[model].running) + len(self.batches[model].waiting)


Waiting = tuple[int, schedule.Sequence, Request]  # by the sequence's id: first come, first served


@dataclass
class Router:
    queue: int  # requests that may wait or run
    limits: tuple[Limits, ...] = ()  # of each model, once hosts stand
    replicas: list[Replica] = field(default_factory=list)  # that stand
    step: int | None = None  # of the run that is served
    closed: bool = False  # for good
    lock: threading.RLock = field(default_factory=threading.RLock)  # over what is below, and each replica's batches
    waiting: tuple[list[Waiting], list[Waiting]] = field(default_factory=lambda: ([], []))  # heaps, one a model
    requests: dict[int, Request] = field(default_factory=dict)  # by the id of each sequence
    places: dict[int, Replica] = field(default_factory=dict)  # who has a sequence, by its id
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    open: int = 0  # requests that have not ended; of the HTTP server's thread
    metrics: Metrics = field(default_factory=new_metrics)
    tokens: int = 0  # chosen so far
    newest: dict[int, float] = field(default_factory=dict)  # by sequence: time.monotonic() of its newest token
    measured: Measured = field(default_factory=Measured)

    @property
    def stands(self) -> bool:
        """Whether a replica does, and takes what is new."""
        return not self.closed and any(not replica.draining for replica in self.replicas)


def new_sequences(
    router: Router, prompt: tuple[int, ...], choices: int, sampling: Sampling, max_tokens: int, stops: Iterable[int]
) -> list[schedule.Sequence]:
    """Choices of one prompt have seeds that follow one another."""
    seeds = [(sampling.seed + n) % 2**64 for n in range(choices)]
    ends = frozenset(stops)
    return [
        schedule.Sequence(next(router.numbers), prompt, replace(sampling, seed=seed), max_tokens, ends)
        for seed in seeds
    ]


def submit(router: Router, sequences: Sequence[schedule.Sequence], model: int = SERVED) -> Request:
    """Called on the HTTP server's thread."""
    request = Request(tuple(sequences), asyncio.Queue(), asyncio.get_running_loop(), model)
    if model == SERVED:
        router.metrics.prompt_tokens.inc(sum(len(sequence.prompt) for sequence in sequences))
    with router.lock:
        for sequence in sequences:
            router.requests[sequence.id] = request
            heapq.heappush(router.waiting[model], (sequence.id, sequence, request))
    wake(router)
    return request


def wake(router: Router) -> None:
    for replica in list(router.replicas):
        replica.arrived.set()


def cancel(router: Router, request: Request) -> None:
    """The client is gone, or has what it wanted."""
    with router.lock:
        gone = {sequence.id for sequence in request.sequences if router.requests.pop(sequence.id, None)}
        if gone - router.places.keys():
            heap = router.waiting[request.model]
            heap[:] = [one for one in heap if one[0] not in gone]
            heapq.heapify(heap)
        for sequence in request.sequences:
            if replica := router.places.pop(sequence.id, None):
                replica.cancelled.append((replica.batches[request.model], sequence))
                replica.arrived.set()
            else:
                sequence.ended = sequence.ended or "cancelled"


def open_replica(router: Router, limits: Sequence[Limits]) -> Replica:
    """Hosts stand ready, and will take what waits."""
    replica = Replica(tuple(schedule.open_batch(of) for of in limits))
    with router.lock:
        router.limits = tuple(limits)
        router.replicas.append(replica)
    return replica


def close_replica(router: Router, replica: Replica) -> None:
    """Its hosts are gone, or are to end: what it had waits again."""
    with router.lock:
        router.replicas.remove(replica)
        put_back_all(router, replica)
    wake(router)


def restart_replica(router: Router, replica: Replica) -> None:
    """Nothing of what its hosts have computed holds any more."""
    with router.lock:
        put_back_all(router, replica)
        replica.batches = tuple(schedule.open_batch(batch.limits) for batch in replica.batches)
        replica.put_back = 0


def put_back_all(router: Router, replica: Replica) -> None:
    take_cancelled(replica)
    for model, batch in enumerate(replica.batches):
        there = [*batch.running.values(), *(sequence for _, sequence in batch.waiting)]
        for sequence in there:
            router.places.pop(sequence.id, None)
            if (request := router.requests.get(sequence.id)) and sequence.ended is None:
                schedule.restart(sequence)
                heapq.heappush(router.waiting[model], (sequence.id, sequence, request))


def take(router: Router, replica: Replica) -> None:
    """What waits, as far as the replica has room for it."""
    replica.arrived.clear()
    with router.lock:
        take_cancelled(replica)
        for model, batch in enumerate(replica.batches):
            heap = router.waiting[model]
            while heap and may_take(router, replica, model, heap[0][2]):
                _, sequence, _ = heapq.heappop(heap)
                router.places[sequence.id] = replica
                schedule.submit(batch, sequence)


def take_cancelled(replica: Replica) -> None:
    while replica.cancelled:
        schedule.cancel(*replica.cancelled.popleft())


def may_take(router: Router, replica: Replica, model: int, request: Request) -> bool:
    """The least loaded goes first; but nobody waits for one that does not come."""
    if replica.held(model) >= replica.batches[model].limits.slots:
        return False
    others = [one.held(model) for one in router.replicas if one is not replica and not one.draining]
    if not others:
        return True
    least = replica.held(model) <= min(others) or time.monotonic() - request.came > LEAST_LOADED_S
    return least and not replica.draining


def is_done(router: Router, replica: Replica) -> bool:
    """Whether a replica that drains has nothing left to do."""
    with router.lock:
        others = any(not one.draining for one in router.replicas)
        return not replica.cancelled and not replica.held() and (others or not any(router.waiting))


def deliver(router: Router, replica: Replica, news: Sequence[News]) -> None:
    """Hands what came to the clients."""
    now = time.monotonic()
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Part]]] = {}
    with router.lock:
        router.measured.plans += 1
        for item in news:
            sequence = item.sequence
            if sequence.ended is not None:
                router.places.pop(sequence.id, None)
            if (request := router.requests.get(sequence.id)) is None:
                continue
            if request.model == SERVED:
                count_tokens(router, replica, request, item, now)
            choice = next(n for n, one in enumerate(request.sequences) if one is sequence)
            part = Part(choice, item.chosen, sequence.ended, item.scored)
            by_loop.setdefault(request.loop, []).append((request, part))
            if sequence.ended is not None:
                del router.requests[sequence.id]
                router.newest.pop(sequence.id, None)
    for loop, parts in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(put_all, parts)


def put_all(parts: Sequence[tuple[Request, Part]]) -> None:
    for request, part in parts:
        request.parts.put_nowait(part)


def count_tokens(router: Router, replica: Replica, request: Request, item: News, now: float) -> None:
    metrics, sequence = router.metrics, item.sequence
    both = router.measured, replica.measured
    if item.chosen is not None and item.chosen.tokens:
        count = len(item.chosen.tokens)
        router.tokens += count
        metrics.generation_tokens.inc(count)
        before = router.newest.get(sequence.id)
        if before is None:
            metrics.first_token_s.observe(now - request.came)
            metrics.cached_tokens.inc(sequence.found)
        else:
            metrics.between_tokens_s.observe((now - before) / count)
        for measured in both:
            measured.tokens += count
            waits = measured.first_s if before is None else measured.between_s
            waits.append(now - request.came if before is None else (now - before) / count)
        router.newest[sequence.id] = now
    if sequence.ended is not None:
        metrics.finished.labels(sequence.ended).inc()
        metrics.request_s.observe(now - request.came)


def show(router: Router) -> None:
    """What /metrics says of the moment."""
    metrics = router.metrics
    with router.lock:
        batches = [replica.batches[SERVED] for replica in router.replicas]
        metrics.running.set(sum(len(batch.running) for batch in batches))
        metrics.waiting.set(len(router.waiting[SERVED]) + sum(len(batch.waiting) for batch in batches))
        metrics.cache_used.set(cache_used(batches))
        for replica in router.replicas:
            there = replica.batches[SERVED].put_back
            metrics.put_back.inc(there - replica.put_back)
            replica.put_back = there


def cache_used(batches: Sequence[Batch]) -> float:
    """The share of the caches' pages that sequences have."""
    return sum(map(schedule.pages_used, batches)) / max(1, len(batches))


def give_up(router: Router, why: str) -> None:
    """No hosts will come any more: everybody is told."""
    with router.lock:
        router.closed = True
        live = {id(request): request for request in router.requests.values()}
        router.requests.clear()
        for heap in router.waiting:
            heap.clear()
    for request in live.values():
        parts = [(request, Part(n, None, why)) for n, one in enumerate(request.sequences) if one.ended is None]
        if not request.loop.is_closed():
            request.loop.call_soon_threadsafe(put_all, parts)
