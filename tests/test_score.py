"""Scores are exact: what requests have in common is computed once, and each gets what the whole forward pass says."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma.batching import rows
from gemma.batching.rows import Plan, Request, Row, make_plan, make_row
from gemma.config import Evaluate, Mesh
from gemma.score.scorer import Scorer
from tests import hf_cases
from tests.test_config import config_of
from tests.test_engine import MODELS

CLOSE = 1e-4  # of log-probabilities in float32


def request(tokens: list[int], cut: int) -> Request:
    return Request(tuple(tokens), cut)


def task(rng: random.Random, shots: int, documents: int, vocab: int) -> list[list[Request]]:
    """A prefix of so many tokens, contexts behind it, and choices of some tokens or of one."""

    def some(least: int, most: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(rng.randint(least, most))]

    prefix, found = [2, *some(shots, shots)], []
    for _ in range(documents):
        context = prefix + some(1, 12)
        kind = rng.randrange(3)
        if kind == 0:  # one token each
            found.append([request([*context, token], len(context)) for token in rng.sample(range(3, vocab), 4)])
        elif kind == 1:  # choices of some tokens
            found.append([request(context + choice, len(context)) for choice in (some(1, 9) for _ in range(3))])
        else:  # the choice stands in the context, and the rest is scored
            rest = some(2, 6)
            contexts = [context + some(1, 3) for _ in range(2)]
            found.append([request(one + rest, len(one)) for one in contexts])
    return found


def scorer(tmp_path: Path, name: str, tasks: list[list[list[Request]]], mesh: Mesh, block: int = 64) -> Scorer:
    model = MODELS[name]
    weights = tmp_path / f"weights-{name}"
    if not weights.exists():
        hf_cases.write_folder(weights, model)
    rows.save(make_plan(tasks, block), tmp_path / rows.FILE)
    made = config_of()
    program = replace(
        made.program,
        model=model,
        mesh=mesh,
        train=replace(made.train, dtype="float32"),
        evaluate=evaluating(weights),
    )
    found = Scorer(program, tmp_path, tmp_path / "cache")
    found.restore(0, found.blocks.digest)
    return found


def evaluating(weights: Path) -> Evaluate:
    return Evaluate(str(weights), None, "quick", (), None, None, False, False, False, 64, 4)


def answers(made: Scorer, order: list[int] | None = None) -> dict[int, tuple[float, bool]]:
    """By request."""
    devices = made.mesh.shape["replica"] * made.mesh.shape["fsdp"]
    steps = rows.steps(made.blocks.plan, order or range(made.blocks.plan.blocks), devices)
    found = {}
    for scores in made.score(steps):
        found |= dict(zip(made.blocks.plan.requests_of(scores.block), scores.found, strict=True))
    return found


def by_the_whole_pass(weights: Path, requests: list[Request]) -> list[tuple[float, bool]]:
    from gemma.model.load import load_hf

    gemma = load_hf(weights)
    found = []
    for one in requests:
        logits = np.asarray(gemma(jnp.array([one.tokens]))[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(one.cut - 1, len(one.tokens) - 1)
        total = sum(logprobs[at, one.tokens[at + 1]] for at in places)
        found.append((total, all(logits[at].argmax() == one.tokens[at + 1] for at in places)))
    return found


TASKS = [(0, 7), (40, 9), (33, 5)]  # shots and documents


def some_tasks(name: str) -> list[list[list[Request]]]:
    rng = random.Random(5)
    return [task(rng, shots, documents, MODELS[name].vocab) for shots, documents in TASKS]


@pytest.mark.parametrize("name", list(MODELS))
def test_each_request_gets_what_the_whole_forward_pass_says(tmp_path: Path, name: str) -> None:
    tasks = some_tasks(name)
    made = scorer(tmp_path, name, tasks, Mesh(1, 1, 1))
    found = answers(made)
    requests = [one for documents in tasks for document in documents for one in document]
    wanted = by_the_whole_pass(tmp_path / f"weights-{name}", requests)
    assert [found[n][1] for n in range(len(requests))] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([found[n][0] for n in range(len(requests))], [total for total, _ in wanted], atol=CLOSE)


@pytest.mark.parametrize("mesh", [Mesh(2, 1, 1), Mesh(2, 2, 1), Mesh(1, 4, 1)])
def test_any_number_of_devices_gives_the_same_bits(tmp_path: Path, mesh: Mesh) -> None:
    name = next(iter(MODELS))
    tasks = some_tasks(name)
    alone = answers(scorer(tmp_path, name, tasks, Mesh(1, 1, 1)))
    assert answers(scorer(tmp_path, name, tasks, mesh)) == alone


def test_what_is_asked_in_another_order_or_by_parts_has_the_same_bits(tmp_path: Path) -> None:
    name = next(iter(MODELS))
    made = scorer(tmp_path, name, some_tasks(name), Mesh(1, 1, 1))
    whole, order = answers(made), list(range(made.blocks.plan.blocks))
    random.Random(3).shuffle(order)
    assert answers(made, order) == whole
    assert answers(made, order[:2]).items() <= whole.items()


def test_heads_cut_in_two_give_the_same_within_rounding(tmp_path: Path) -> None:
    name = next(iter(MODELS))
    tasks = some_tasks(name)
    alone, cut = (answers(scorer(tmp_path, name, tasks, mesh)) for mesh in (Mesh(1, 1, 1), Mesh(1, 1, 2)))
    np.testing.assert_allclose([cut[n][0] for n in alone], [alone[n][0] for n in alone], atol=CLOSE)


def test_a_row_has_what_is_common_once_and_one_token_choices_cost_nothing() -> None:
    choices = [request([2, 5, 6, 7, token], 4) for token in (10, 11, 12, 13)]
    assert make_row(choices, 0) == Row(
        (2, 5, 6, 7), (0, 1, 2, 3), (0, 0, 0, 0), (3, 3, 3, 3), (10, 11, 12, 13), (1, 1, 1, 1)
    )
    longer = [request([2, 5, 6, 7, 8], 3), request([2, 5, 6, 9, 8], 3)]
    assert make_row(longer, 1) == Row((5, 6, 7, 9), (1, 2, 3, 3), (0, 0, 1, 2), (1, 2, 1, 3), (7, 8, 9, 8), (2, 2))


def test_a_prefix_is_computed_once_for_a_task() -> None:
    shots = list(range(100, 160))
    documents = [[request([2, *shots, 7, number, 5], 63)] for number in range(10)]
    plan = make_plan([documents], 64)
    assert plan.prefix_at.tolist() == [0, 62]
    assert plan.tokens.tolist() == [token for number in range(10) for token in (number,)]


def test_every_request_is_in_one_block_and_no_row_is_cut() -> None:
    plan = make_plan(some_tasks(next(iter(MODELS))), 64)
    asked = [request for block in range(plan.blocks) for request in plan.requests_of(block)]
    assert sorted(asked) == list(range(len(plan.counts)))
    for block in range(plan.blocks):
        _, width, size, targets = plan.shapes[block]
        members = plan.rows[plan.rows_at[block] : plan.rows_at[block + 1]]
        assert len(members) <= size
        assert all(plan.row_at[row + 1] - plan.row_at[row] <= width for row in members)
        assert sum(plan.target_at[row + 1] - plan.target_at[row] for row in members) <= targets


def test_steps_hold_blocks_of_one_shape_and_prefix_and_each_once() -> None:
    plan = make_plan(some_tasks(next(iter(MODELS))), 64)
    for devices in (1, 3, 8):
        steps = rows.steps(plan, range(plan.blocks), devices)
        assert sorted(block for step in steps for block in step if block >= 0) == list(range(plan.blocks))
        for step in steps:
            assert len(step) == devices
            assert len({tuple(plan.shapes[block]) for block in step if block >= 0}) == 1


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = make_plan(some_tasks(next(iter(MODELS))), 64)
    rows.save(plan, tmp_path / rows.FILE)
    again: Plan = rows.load(tmp_path / rows.FILE)
    assert again.digest() == plan.digest()
    assert make_plan(some_tasks(next(iter(MODELS))), 32).digest() != plan.digest()


def test_widths_pad_least() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(1, 200) for _ in range(300)]
    known = sorted({-(-length // 16) * 16 for length in lengths})
    widths = rows.widths_for(lengths)
    assert len(widths) <= rows.MOST_WIDTHS

    def places(chosen: list[int]) -> int:
        return sum(rows.at_least(chosen, length) for length in lengths)

    every = itertools.combinations(known[:-1], rows.MOST_WIDTHS - 1)
    assert places(widths) == min(places([*some, known[-1]]) for some in every)
