"""The requests of all clients, between the HTTP server's thread and the thread that drives the hosts.

A request outlives hosts: its tokens are kept here, and hosts that come after others compute it again and go on.
"""

import asyncio
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
class Router:
    queue: int  # requests that may wait or run
    limits: tuple[Limits, ...] = ()  # of each model, once hosts stand
    batches: tuple[Batch, ...] = ()
    step: int | None = None  # of the run that is served
    stands: bool = False  # hosts stand ready, and answer
    draining: bool = False
    inbox: deque[tuple[str, Request]] = field(default_factory=deque)  # submit or cancel
    arrived: threading.Event = field(default_factory=threading.Event)
    requests: dict[int, Request] = field(default_factory=dict)  # by the id of each sequence
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    open: int = 0  # requests that have not ended; of the HTTP server's thread
    metrics: Metrics = field(default_factory=new_metrics)
    tokens: int = 0  # chosen so far
    put_back: int = 0  # sequences of this batch, as /metrics has it
    drain_until: float = 0.0  # time.monotonic()
    newest: dict[int, float] = field(default_factory=dict)  # by sequence: time.monotonic() of its newest token
    first_s: list[float] = field(default_factory=list)  # to first tokens, since metrics.jsonl had a line
    between_s: list[float] = field(default_factory=list)  # between tokens, likewise


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
    router.inbox.append(("submit", request))
    router.arrived.set()
    return request


def cancel(router: Router, request: Request) -> None:
    """The client is gone, or has what it wanted."""
    router.inbox.append(("cancel", request))
    router.arrived.set()


def open_batches(router: Router, limits: Sequence[Limits]) -> None:
    """Hosts stand ready, maybe after others: whatever was computed is gone, what was chosen is known."""
    live = [unfinished(batch) for batch in router.batches] or [[] for _ in limits]
    router.limits, router.put_back = tuple(limits), 0
    router.batches = tuple(schedule.open_batch(of) for of in limits)
    for batch, sequences in zip(router.batches, live, strict=True):
        for sequence in sequences:
            schedule.restart(sequence)
            schedule.submit(batch, sequence)


def unfinished(batch: Batch) -> list[schedule.Sequence]:
    there = [*batch.running.values(), *(sequence for _, sequence in batch.waiting)]
    return [sequence for sequence in there if sequence.ended is None]


def take_inbox(router: Router) -> None:
    """What clients have asked since the last time."""
    router.arrived.clear()
    while router.inbox:
        what, request = router.inbox.popleft()
        batch = router.batches[request.model]
        for sequence in request.sequences:
            if what == "cancel":
                schedule.cancel(batch, sequence)
                router.requests.pop(sequence.id, None)
            else:
                router.requests[sequence.id] = request
                if request.model == SERVED:
                    router.metrics.prompt_tokens.inc(len(sequence.prompt))
                schedule.submit(batch, sequence)


def deliver(router: Router, news: Sequence[News]) -> None:
    """Hands what came to the clients."""
    now = time.monotonic()
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Part]]] = {}
    for item in news:
        sequence = item.sequence
        if (request := router.requests.get(sequence.id)) is None:
            continue
        if request.model == SERVED:
            count_tokens(router, request, item, now)
        choice = next(n for n, one in enumerate(request.sequences) if one is sequence)
        by_loop.setdefault(request.loop, []).append((request, Part(choice, item.chosen, sequence.ended, item.scored)))
        if sequence.ended is not None:
            del router.requests[sequence.id]
            router.newest.pop(sequence.id, None)
    for loop, parts in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(put_all, parts)


def put_all(parts: Sequence[tuple[Request, Part]]) -> None:
    for request, part in parts:
        request.parts.put_nowait(part)


def count_tokens(router: Router, request: Request, item: News, now: float) -> None:
    metrics, sequence = router.metrics, item.sequence
    if item.chosen is not None and item.chosen.tokens:
        count = len(item.chosen.tokens)
        router.tokens += count
        metrics.generation_tokens.inc(count)
        before = router.newest.get(sequence.id)
        if before is None:
            metrics.first_token_s.observe(now - request.came)
            router.first_s.append(now - request.came)
            metrics.cached_tokens.inc(sequence.found)
        else:
            metrics.between_tokens_s.observe((now - before) / count)
            router.between_s.append((now - before) / count)
        router.newest[sequence.id] = now
    if sequence.ended is not None:
        metrics.finished.labels(sequence.ended).inc()
        metrics.request_s.observe(now - request.came)


def show(router: Router) -> None:
    """What /metrics says of the moment."""
    metrics = router.metrics
    for batch in router.batches[: SERVED + 1]:
        metrics.running.set(len(batch.running))
        metrics.waiting.set(len(batch.waiting))
        metrics.cache_used.set(schedule.pages_used(batch))
        metrics.put_back.inc(batch.put_back - router.put_back)
        router.put_back = batch.put_back


def give_up(router: Router, why: str) -> None:
    """No hosts will come any more: everybody is told."""
    router.stands, router.draining = False, True
    waiting = [request for what, request in router.inbox if what == "submit"]
    live = {id(request): request for request in [*router.requests.values(), *waiting]}
    for request in live.values():
        parts = [(request, Part(n, None, why)) for n, one in enumerate(request.sequences) if one.ended is None]
        if not request.loop.is_closed():
            request.loop.call_soon_threadsafe(put_all, parts)
    router.requests.clear()
    router.inbox.clear()
