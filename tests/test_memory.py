"""Which step all shares can be had of, and who keeps a copy of whose. Pure."""

import random
from typing import Any

import pytest

from gemma.memory.wire import Address
from orchestrator.hosts.keeper import Held
from orchestrator.hosts.memory import CommonStep, branches, buddies, newest_common

Steps = dict[str, tuple[tuple[int, int], ...]]


def held(steps: Steps) -> Held:
    return Held(Address("127.0.0.1", 1, ""), steps, {}, 0, {}, 0, None)


@pytest.mark.parametrize(
    ("keys", "memories", "expected"),
    [
        # Each host has its own; one is a step ahead.
        ("ab", {"x": {"a": ((1, 1), (2, 1), (3, 1))}, "y": {"b": ((1, 1), (2, 1))}}, CommonStep(2, 1, ("x", "y"))),
        # y is gone: its share comes from its buddy.
        ("ab", {"x": {"a": ((2, 1),), "b": ((1, 1), (2, 1))}}, CommonStep(2, 1, ("x", "x"))),
        # Both hosts of one share are gone.
        ("ab", {"x": {"a": ((2, 1),)}}, None),
        # A replica's host holds the same bytes.
        ("aa", {"y": {"a": ((4, 1), (5, 1))}}, CommonStep(5, 1, ("y", "y"))),
        # Nothing in common, then nothing at all.
        ("ab", {"x": {"a": ((3, 1),)}, "y": {"b": ((2, 1),)}}, None),
        ("ab", {}, None),
        # The same step of two attempts is not the same snapshot.
        ("ab", {"x": {"a": ((3, 1), (2, 1))}, "y": {"b": ((3, 2), (2, 1))}}, CommonStep(2, 1, ("x", "y"))),
    ],
)
def test_the_newest_step_that_every_share_can_be_had_of(
    keys: str, memories: dict[str, Steps], expected: CommonStep | None
) -> None:
    found = {node: held(steps) for node, steps in memories.items()}
    assert newest_common(list(keys), ["x", "y"], found, {}) == expected


def test_what_a_later_attempt_has_left_behind_is_of_no_history() -> None:
    there = {"x": held({"a": ((20, 1), (30, 1))})}
    events: list[dict[str, Any]] = [
        {"event": "initialise", "attempt": 1, "step": 0},
        {"event": "restore", "attempt": 2, "step": 25},
    ]
    assert newest_common(["a"], ["x"], there, branches(events)) == CommonStep(20, 1, ("x",))
    assert newest_common(["a"], ["x"], there, branches(events[:1])) == CommonStep(30, 1, ("x",))


def test_no_step_beyond_the_limit() -> None:
    there = {"x": held({"a": ((20, 1), (30, 1))})}
    assert newest_common(["a"], ["x"], there, {}, limit=29) == CommonStep(20, 1, ("x",))


def test_hosts_as_far_apart_as_they_may_be_always_have_one_in_common() -> None:
    """Each holds the newest four, or three while it writes: whatever moment they die at."""
    dice = random.Random(0)
    for _ in range(500):
        hosts, step = dice.randint(2, 6), dice.randint(5, 50)
        memories = {}
        for host in range(hosts):
            newest = step - dice.randint(0, 3)  # whole
            writing = newest < step and dice.random() < 0.5
            steps = range(newest - (2 if writing else 3), newest + 1)
            memories[str(host)] = held({str(host): tuple((s, 1) for s in steps)})
        names = [str(host) for host in range(hosts)]
        found = newest_common(names, names, memories, {})
        assert found is not None
        assert found.step >= step - 3


@pytest.mark.parametrize(
    ("keys", "slices", "expected"),
    [
        ("a", "s", [None]),  # alone
        ("ab", "ss", [1, 0]),
        ("abcd", "ssss", [1, 2, 3, 0]),
        ("abab", "sstt", [None] * 4),  # the other slice's replica has it
        ("abcd", "sstt", [2, 3, 0, 1]),  # its like in another slice
        ("aabb", "ssss", [None] * 4),
    ],
)
def test_a_copy_lies_on_another_host_in_another_slice_where_there_is_one(
    keys: str, slices: str, expected: list[int | None]
) -> None:
    assert buddies(list(keys), list(slices)) == expected


def test_every_share_survives_the_loss_of_any_one_host_and_of_any_one_slice() -> None:
    for slices, hosts in ((1, 2), (1, 16), (2, 4), (4, 3)):
        names = [str(s) for s in range(slices) for _ in range(hosts)]
        keys = [str(rank) for rank in range(slices * hosts)]
        found = buddies(keys, names)
        assert all(buddy is not None and buddy != rank for rank, buddy in enumerate(found))
        if slices > 1:
            assert all(names[buddy] != names[rank] for rank, buddy in enumerate(found) if buddy is not None)
