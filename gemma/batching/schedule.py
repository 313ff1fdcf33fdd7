"""Which sequences are computed next: continuous batching over pages, first come first served. No device is touched.

`plan` says what the replica does next, `take_answer` what came of it. Several plans may be under way: a plan is made of
what earlier plans will have done, and never of what they will have chosen.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gemma.batching import pool as pools
from gemma.batching.plans import Admit, Answer, Chosen, Chunk, Limits, Plan, Row, Sampling, Scored, Table, pages_for
from gemma.batching.pool import Pool

LOCAL, GLOBAL = 0, 1


@dataclass
class Sequence:
    """Tokens that are given, and those that are chosen after them."""

    id: int  # in the order they came
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int  # to be chosen
    stops: frozenset[int]  # tokens that end it
    score_from: int | None = None  # the first token of the prompt that is to be scored; it moves on with the answers
    tokens: list[int] = field(default_factory=list)  # chosen, as far as they are known
    ended: str | None = None  # stop, length or cancelled
    slot: int | None = None
    computed: int = 0  # positions whose keys and values are there once all plans sent are done
    under_way: int = 0  # tokens that plans sent will have chosen
    decoding: bool = False  # its next token goes in at position `computed`, and is known on the devices
    plans: int = 0  # sent and not answered
    found: int = 0  # positions that were in the cache when it was first given a slot
    pages: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    first_local: int = 0  # the page number of its first local page
    keys: list[bytes] = field(default_factory=list)  # of its full pages

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens that no plan has been sent for."""
        return self.max_tokens - len(self.tokens) - self.under_way


@dataclass
class Batch:
    limits: Limits
    local: Pool
    whole: Pool  # of global layers
    waiting: list[tuple[int, Sequence]] = field(default_factory=list)  # a heap, by id
    running: dict[int, Sequence] = field(default_factory=dict)  # by slot
    sent: dict[int, dict[int, Sequence]] = field(default_factory=dict)  # by plan: who was in which slot
    number: int = 0
    put_back: int = 0  # sequences, so far, for want of pages
    found: int = 0  # positions, so far, that did not have to be computed

    @property
    def pools(self) -> tuple[Pool, Pool]:
        return self.local, self.whole


@dataclass(frozen=True)
class News:
    """What an answer brought for a sequence."""

    sequence: Sequence
    chosen: Chosen | None
    scored: Scored | None


def open_batch(limits: Limits) -> Batch:
    return Batch(limits, Pool(limits.local_pages), Pool(limits.global_pages))


def refusal(limits: Limits, sequence: Sequence) -> str | None:
    """Why a sequence can never be computed; None where it can."""
    length = len(sequence.prompt) + sequence.max_tokens
    if length > limits.context:
        return f"{len(sequence.prompt)} tokens and max_tokens={sequence.max_tokens}: the context is {limits.context}"
    if pages_for(length, limits.page) > limits.global_pages - 1:
        return f"{length} tokens: the cache holds {(limits.global_pages - 1) * limits.page}"
    return None


def submit(batch: Batch, sequence: Sequence) -> None:
    heapq.heappush(batch.waiting, (sequence.id, sequence))


def cancel(batch: Batch, sequence: Sequence, why: str = "cancelled") -> None:
    """Its slot and pages are free at once: later plans are done later on the devices too."""
    sequence.ended = sequence.ended or why
    if sequence.slot is not None:
        leave(batch, sequence)
    batch.waiting = [one for one in batch.waiting if one[1] is not sequence]
    heapq.heapify(batch.waiting)


def restart(sequence: Sequence) -> None:
    """Nothing of what it was on the devices is there any more, nor will any answer come."""
    sequence.slot, sequence.computed, sequence.first_local, sequence.decoding = None, 0, 0, False
    sequence.under_way, sequence.plans, sequence.pages = 0, 0, ([], [])


def idle(batch: Batch) -> bool:
    return not batch.running and all(sequence.ended is not None for _, sequence in batch.waiting)


def plan(batch: Batch, steps: int, budget: int) -> Plan:
    """steps: of decoding. budget: tokens of prompts beside them, at least one chunk."""
    rows = decode_rows(batch, steps)
    admits = [admission(sequence) for sequence in admit(batch)]
    chunks = list(prefill(batch, budget, patient=bool(rows)))
    batch.number += 1
    made = Plan(batch.number, tuple(admits), tuple(chunks), tuple(rows), steps if rows else 0)
    if not made.empty:
        slots = {chunk.slot for chunk in chunks} | {row.slot for row in rows}
        batch.sent[made.number] = {slot: batch.running[slot] for slot in slots}
        for sequence in batch.sent[made.number].values():
            sequence.plans += 1
    return made


def decode_rows(batch: Batch, steps: int) -> list[Row]:
    """The oldest first: whoever is put back for want of pages comes after those that have their row."""
    rows = []
    for sequence in oldest_first(batch):
        if not sequence.decoding or sequence.left <= 0:
            continue
        count = min(steps, sequence.left)
        if room(batch, sequence, sequence.computed, sequence.computed + count):
            assert sequence.slot is not None
            rows.append(Row(sequence.slot, sequence.computed, tables(sequence)))
            sequence.computed += count
            sequence.under_way += count
    return rows


def pages_used(batch: Batch) -> float:
    """The share of the pages of global layers that sequences have."""
    return pools.used(batch.whole) / max(1, batch.whole.size - 1)


def oldest_first(batch: Batch) -> list[Sequence]:
    return sorted(batch.running.values(), key=lambda sequence: sequence.id)


def room(batch: Batch, sequence: Sequence, start: int, stop: int) -> bool:
    """Gives it pages for the positions up to stop. For want of them the youngest is put back, maybe itself: False."""
    if sequence.slot is None:
        return False
    while not give_pages(batch, sequence, start, stop):
        youngest = oldest_first(batch)[-1]
        put_back(batch, youngest)
        if youngest is sequence:
            return False
    return True


def give_pages(batch: Batch, sequence: Sequence, start: int, stop: int) -> bool:
    """All that it needs, or nothing. What no later position of a local layer sees is given back first."""
    page, (local, whole) = batch.limits.page, sequence.pages
    first = max(0, start - batch.limits.window + 1) // page
    while local and sequence.first_local < first:
        pools.release(batch.local, local.pop(0))
        sequence.first_local += 1
    if not local:
        sequence.first_local = max(first, sequence.first_local)
    last = pages_for(stop, page)
    lacks = last - sequence.first_local - len(local), last - len(whole)
    if lacks[LOCAL] > pools.available(batch.local) or lacks[GLOBAL] > pools.available(batch.whole):
        return False
    local += [pools.take(batch.local) for _ in range(lacks[LOCAL])]
    whole += [pools.take(batch.whole) for _ in range(lacks[GLOBAL])]
    return True


def tables(sequence: Sequence) -> tuple[Table, Table]:
    local, whole = sequence.pages
    return Table(sequence.first_local, tuple(local)), Table(0, tuple(whole))


def put_back(batch: Batch, sequence: Sequence) -> None:
    """It is computed again, later, from its prompt and what it has chosen."""
    leave(batch, sequence)
    batch.put_back += 1
    submit(batch, sequence)


def leave(batch: Batch, sequence: Sequence) -> None:
    keep_full_pages(batch, sequence)
    for pool, pages in zip(batch.pools, sequence.pages, strict=True):
        for page in pages:
            pools.release(pool, page)
        pages.clear()
    assert sequence.slot is not None
    del batch.running[sequence.slot]
    sequence.slot, sequence.computed, sequence.first_local, sequence.decoding = None, 0, 0, False


def admit(batch: Batch) -> Iterator[Sequence]:
    """Those who have waited longest, as long as there are slots, and pages for all of their prompt."""
    while batch.waiting and len(batch.running) < batch.limits.slots:
        sequence = batch.waiting[0][1]
        if sequence.ended is not None:  # put back, and then an answer under way ended it
            heapq.heappop(batch.waiting)
            continue
        if sequence.plans:  # put back with answers still to come: its tokens are not known yet
            return
        needs = pages_for(sequence.known + 1, batch.limits.page)
        windowed = min(needs, pages_for(batch.limits.window + batch.limits.chunks[-1], batch.limits.page) + 1)
        if (needs > pools.available(batch.whole) or windowed > pools.available(batch.local)) and batch.running:
            return
        heapq.heappop(batch.waiting)
        sequence.slot = min(set(range(batch.limits.slots)) - batch.running.keys())
        batch.running[sequence.slot] = sequence
        share_prefix(batch, sequence)
        yield sequence


def admission(sequence: Sequence) -> Admit:
    assert sequence.slot is not None
    sampling = sequence.sampling
    seen = tuple(sorted(set(sequence.prompt))) if sampling.repetition != 1.0 else ()
    return Admit(sequence.slot, sampling, seen, tuple(sequence.tokens))


def share_prefix(batch: Batch, sequence: Sequence) -> None:
    """Takes the pages of the longest prefix that lies in both pools: of local layers, what its end sees."""
    page, window = batch.limits.page, batch.limits.window
    most = sequence.known - 1 if sequence.score_from is None else min(sequence.known, sequence.score_from) - 1
    page_keys(sequence, page)
    whole = []
    for key in sequence.keys[: most // page]:
        if (at := pools.find(batch.whole, key)) is None:
            break
        whole.append(at)
    for count in range(len(whole), 0, -1):
        first = max(0, count * page - window + 1) // page
        local = [pools.find(batch.local, key) for key in sequence.keys[first:count]]
        if None in local:
            continue
        sequence.pages = ([at for at in local if at is not None], whole[:count])
        for pool, pages in zip(batch.pools, sequence.pages, strict=True):
            for at in pages:
                pools.share(pool, at)
        sequence.first_local, sequence.computed = first, count * page
        batch.found += count * page
        if not sequence.tokens:
            sequence.found = count * page
        return


def page_keys(sequence: Sequence, page: int) -> None:
    """A key names a page's tokens and all before them."""
    have = len(sequence.keys)
    if sequence.known // page > have:
        ids = np.array([*sequence.prompt, *sequence.tokens], np.int32)
        for index in range(have, sequence.known // page):
            before = sequence.keys[-1] if sequence.keys else b""
            tokens = ids[index * page : (index + 1) * page].tobytes()
            sequence.keys.append(hashlib.blake2b(before + tokens, digest_size=16).digest())


def keep_full_pages(batch: Batch, sequence: Sequence) -> None:
    """What is full, and computed by plans that are sent, is found by whoever comes with the same tokens."""
    page = batch.limits.page
    page_keys(sequence, page)
    full = min(sequence.computed, sequence.known) // page
    local, whole = sequence.pages
    for index, key in enumerate(sequence.keys[:full]):
        pools.keep(batch.whole, whole[index], key)
        if index >= sequence.first_local:
            pools.keep(batch.local, local[index - sequence.first_local], key)


def prefill(batch: Batch, budget: int, patient: bool) -> Iterator[Chunk]:
    """Prompts that are not computed yet, the oldest first. patient: pages are waited for, as others will leave some."""
    for sequence in oldest_first(batch):
        missing = sequence.known - sequence.computed
        if sequence.decoding or missing <= 0:
            continue
        count = min(missing, batch.limits.chunks[-1])
        start, stop = sequence.computed, sequence.computed + count
        if count > budget or not (give_pages if patient else room)(batch, sequence, start, stop):
            return
        budget -= count
        yield chunk(batch, sequence, count)


def chunk(batch: Batch, sequence: Sequence, count: int) -> Chunk:
    assert sequence.slot is not None
    ids, start = (*sequence.prompt, *sequence.tokens), sequence.computed
    stop = start + count
    last = stop == sequence.known
    first = len(sequence.prompt) if sequence.score_from is None else max(start + 1, sequence.score_from)
    targets = ids[first : min(stop + 1, len(sequence.prompt))]
    sample = last and sequence.left > 0
    made = Chunk(sequence.slot, start, ids[start:stop], tables(sequence), sample, targets, first - 1 - start)
    sequence.computed = stop
    sequence.decoding = made.sample
    sequence.under_way += made.sample
    keep_full_pages(batch, sequence)
    return made


def take_answer(batch: Batch, answer: Answer) -> list[News]:
    """What is known now, sequence by sequence; those that ended have left."""
    news = []
    for slot, sequence in batch.sent.pop(answer.number, {}).items():
        sequence.plans -= 1
        chosen, scored = answer.chosen.get(slot), answer.scored.get(slot)
        if chosen is not None:
            sequence.under_way -= min(len(chosen.tokens), sequence.under_way)
        if sequence.ended is not None:
            continue
        if chosen is not None:
            chosen = cut(chosen, sequence)
            sequence.tokens += chosen.tokens
        if scored is not None and sequence.score_from is not None:
            sequence.score_from += len(scored.logprobs)
        if sequence.tokens and sequence.tokens[-1] in sequence.stops:
            sequence.ended = "stop"
        elif len(sequence.tokens) >= sequence.max_tokens and (sequence.max_tokens or all_scored(sequence)):
            sequence.ended = "length"
        if sequence.ended and sequence.slot is not None:
            leave(batch, sequence)
        news.append(News(sequence, chosen, scored))
    return news


def all_scored(sequence: Sequence) -> bool:
    return sequence.computed >= len(sequence.prompt) and not sequence.plans


def cut(chosen: Chosen, sequence: Sequence) -> Chosen:
    """Without what comes after a stop or beyond max_tokens."""
    count = min(len(chosen.tokens), sequence.max_tokens - len(sequence.tokens))
    for index, token in enumerate(chosen.tokens[:count]):
        if token in sequence.stops:
            count = index + 1
            break
    return Chosen(chosen.tokens[:count], chosen.logprobs[:count], chosen.top[:count])
