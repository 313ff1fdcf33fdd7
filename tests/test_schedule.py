"""Continuous batching without a device: a stand-in keeps the tokens themselves in the pages, and what it answers
depends on all that a row may see there. So a page that is given away too early, shared wrongly or not filled changes
an answer.
"""

import random
from collections import deque
from dataclasses import replace

import pytest

from gemma.batching import pool as pools
from gemma.batching import schedule
from gemma.batching.plans import Answer, Chosen, Limits, Plan, Sampling, Scored, Table
from gemma.batching.schedule import Batch, Sequence

LIMITS = Limits(slots=4, context=96, page=4, window=7, global_pages=48, local_pages=24, rows=(4,), chunks=(8,))
GREEDY = Sampling(temperature=0)
END = 3


def following(tokens: list[int]) -> int:
    """The next token: any change of any token before it shows."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1009
    return END if value % 29 == 0 else 4 + value % 50


def answered(prompt: tuple[int, ...], count: int, stops: frozenset[int]) -> list[int]:
    """By the plain way."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and not (len(tokens) > len(prompt) and tokens[-1] in stops):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class Device:
    def __init__(self, limits: Limits):
        self.limits = limits
        self.pages: tuple[dict[tuple[int, int], int], ...] = ({}, {})
        self.newest: dict[int, int] = {}

    def write(self, position: int, token: int, tables: tuple[Table, Table]) -> None:
        for pages, table in zip(self.pages, tables, strict=True):
            at = position // self.limits.page - table.first
            page = table.pages[at] if at < len(table.pages) else 0
            pages[page, position % self.limits.page] = token

    def seen(self, position: int, tables: tuple[Table, Table]) -> list[int]:
        """All tokens up to a position, and of a local layer those in its window: they must be the same."""
        local, whole = tables
        page = self.limits.page

        def at(pages: dict[tuple[int, int], int], table: Table, where: int) -> int:
            return pages[table.pages[where // page - table.first], where % page]

        tokens = [at(self.pages[1], whole, where) for where in range(position + 1)]
        first = max(0, position - self.limits.window + 1)
        assert [at(self.pages[0], local, where) for where in range(first, position + 1)] == tokens[first:]
        return tokens

    def do(self, plan: Plan) -> Answer:
        chosen: dict[int, list[int]] = {}
        scored = {}
        for chunk in plan.chunks:
            assert len(chunk.tokens) <= self.limits.chunks[-1]
            for offset, token in enumerate(chunk.tokens):
                self.write(chunk.start + offset, token, chunk.tables)
            places = range(chunk.scores_from, chunk.scores_from + len(chunk.targets))
            if chunk.targets:
                given = [self.seen(chunk.start + place, chunk.tables) for place in places]
                scored[chunk.slot] = Scored(
                    tuple(float(t) for t in chunk.targets),
                    tuple(following(g) == t for g, t in zip(given, chunk.targets, strict=True)),
                )
            if chunk.sample:
                self.newest[chunk.slot] = following(self.seen(chunk.start + len(chunk.tokens) - 1, chunk.tables))
                chosen.setdefault(chunk.slot, []).append(self.newest[chunk.slot])
        for step in range(plan.steps):
            for row in plan.rows:
                position = row.position + step
                self.write(position, self.newest[row.slot], row.tables)
                if position < (row.tables[1].first + len(row.tables[1].pages)) * self.limits.page:
                    self.newest[row.slot] = following(self.seen(position, row.tables))
                chosen.setdefault(row.slot, []).append(self.newest[row.slot])
        return Answer(plan.number, {slot: Chosen(tuple(tokens)) for slot, tokens in chosen.items()}, scored)


def run(
    batch: Batch, arrivals: dict[int, list[Sequence]], seed: int, cancels: dict[int, Sequence] | None = None
) -> None:
    """With two plans under way."""
    device, flight, rng = Device(batch.limits), deque(), random.Random(seed)  # type: ignore[var-annotated]
    turn = 0
    while turn <= max(arrivals) or not schedule.idle(batch) or flight:
        for sequence in arrivals.get(turn, ()):
            schedule.submit(batch, sequence)
        if cancels and turn in cancels:
            schedule.cancel(batch, cancels[turn])
        plan = schedule.plan(batch, rng.randint(1, 5), 16)
        if not plan.empty:
            flight.append(device.do(plan))
        if len(flight) >= 2 or plan.empty and flight:
            schedule.take_answer(batch, flight.popleft())
        turn += 1
        assert turn < 10_000, "it comes to an end"


def sequences(rng: random.Random, count: int, stops: frozenset[int]) -> list[Sequence]:
    """Some of them begin alike."""
    common = tuple(rng.randint(4, 50) for _ in range(40))
    found = []
    for number in range(count):
        own = tuple(rng.randint(4, 50) for _ in range(rng.randint(1, 20)))
        prompt = common[: rng.randint(0, 40)] + own if rng.random() < 0.6 else own
        found.append(Sequence(number, prompt, GREEDY, rng.randint(1, 30), stops))
    return found


def all_free(batch: Batch) -> bool:
    return all(
        not pool.users and pools.available(pool) == pool.size - 1 and len(set(pool.free)) == len(pool.free)
        for pool in batch.pools
    )


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("tight", [False, True])
def test_each_sequence_gets_what_it_would_get_alone(seed: int, tight: bool) -> None:
    rng = random.Random(seed)
    limits = replace(LIMITS, global_pages=26, local_pages=14) if tight else LIMITS
    batch, stops = schedule.open_batch(limits), frozenset({END})
    made = sequences(rng, 20, stops)
    arrivals: dict[int, list[Sequence]] = {}
    for one in made:
        arrivals.setdefault(rng.randint(0, 30), []).append(one)
    run(batch, arrivals, seed)
    for one in made:
        assert one.tokens == answered(one.prompt, one.max_tokens, stops), one.id
        assert one.ended == ("stop" if one.tokens[-1] == END else "length")
    assert all_free(batch)


def test_a_small_pool_puts_the_youngest_back_and_a_common_beginning_is_found() -> None:
    """The property above would hold as well if neither ever happened."""
    put_back = found = 0
    for seed in range(10):
        batch = schedule.open_batch(replace(LIMITS, global_pages=26, local_pages=14))
        run(batch, {0: sequences(random.Random(seed), 20, frozenset())}, seed)
        put_back, found = put_back + batch.put_back, found + batch.found
    assert put_back > 10
    assert found > 100


@pytest.mark.parametrize("seed", range(10))
def test_a_cancelled_sequence_leaves_nothing_and_disturbs_nobody(seed: int) -> None:
    rng = random.Random(seed)
    batch, made = schedule.open_batch(LIMITS), sequences(random.Random(seed), 12, frozenset())
    gone = rng.sample(made, 4)
    run(batch, {0: made}, seed, {3 + 4 * at: one for at, one in enumerate(gone)})
    for one in made:
        whole = answered(one.prompt, one.max_tokens, frozenset())
        assert one.tokens == (whole[: len(one.tokens)] if one in gone else whole)
    assert all_free(batch)


def test_no_one_waits_behind_who_came_later() -> None:
    batch = schedule.open_batch(replace(LIMITS, slots=2, global_pages=26))
    made = sequences(random.Random(1), 12, frozenset())
    for one in made:
        schedule.submit(batch, one)
    begun: list[int] = []
    device = Device(batch.limits)
    while not schedule.idle(batch):
        plan = schedule.plan(batch, 2, 16)
        slots = batch.sent[plan.number]
        begun += [s.id for s in sorted(slots.values(), key=lambda s: s.id) if s.id not in begun]
        schedule.take_answer(batch, device.do(plan))
    assert begun == sorted(begun)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("score_from", [1, 5, 8, 9, 16, 33, 40])
def test_every_token_from_the_one_asked_for_is_scored_once(score_from: int, before: bool) -> None:
    """With and without its beginning in the cache."""
    batch, device = schedule.open_batch(LIMITS), Device(LIMITS)
    prompt = tuple(random.Random(0).randint(4, 50) for _ in range(41))
    made = [Sequence(0, prompt, GREEDY, 1, frozenset())] if before else []
    one = Sequence(1, prompt, GREEDY, 0, frozenset(), score_from=score_from)
    news: list[schedule.News] = []
    for sequence in (*made, one):
        schedule.submit(batch, sequence)
        flight: deque[Answer] = deque()
        while not schedule.idle(batch) or flight:
            plan = schedule.plan(batch, 3, 16)
            if not plan.empty:
                flight.append(device.do(plan))
            if len(flight) >= 2 or plan.empty:
                news += schedule.take_answer(batch, flight.popleft())
    greedy = [flag for item in news if item.scored for flag in item.scored.greedy]
    assert greedy == [following(list(prompt[:at])) == prompt[at] for at in range(score_from, len(prompt))]
    assert one.ended == "length"
    assert (batch.found > 0) == (before and score_from > 4)


def test_what_can_never_be_computed_is_refused() -> None:
    small = replace(LIMITS, global_pages=10)
    assert schedule.refusal(LIMITS, Sequence(0, (4,) * 90, GREEDY, 6, frozenset())) is None
    assert "the context is 96" in str(schedule.refusal(LIMITS, Sequence(0, (4,) * 90, GREEDY, 7, frozenset())))
    assert "the cache holds 36" in str(schedule.refusal(small, Sequence(0, (4,) * 30, GREEDY, 7, frozenset())))


def test_equal_tokens_after_another_beginning_are_not_shared() -> None:
    """Their keys and values depend on all that goes before, and on where they stand."""
    beginning, common = tuple(range(4, 8)), tuple(range(20, 28))
    batch = schedule.open_batch(LIMITS)
    made = [
        Sequence(n, prompt, GREEDY, 5, frozenset()) for n, prompt in enumerate([beginning + common, common + beginning])
    ]
    for turn, one in enumerate(made):
        run(batch, {0: [one]}, turn)
    assert batch.found == 0
