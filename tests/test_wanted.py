"""What is done about the difference between what is wanted of a provider and what is there. No cloud."""

import random
from dataclasses import replace

import pytest

from orchestrator.slices.wanted import Create, Delete, Request, State, Wanted, owner_label, reconcile, request_name

WANTED = Wanted("run", "v5p-16", "2x2x2", 1, ("a", "b", "c"), patience_s=100.0)
NOW = 1000.0


def there(name: str, state: State, **other: object) -> Request:
    return replace(Request(name, "a", "run", state, "v5p-16", "2x2x2", NOW - 10), **other)  # type: ignore[arg-type]


def told(found: list[Create | Delete]) -> list[str]:
    return [f"ask {one.zone}" if isinstance(one, Create) else f"back {one.request.name}: {one.why}" for one in found]


@pytest.mark.parametrize(
    ("count", "requests", "turned_down", "bad", "expected"),
    [
        (1, [], {}, {}, ["ask a"]),
        (1, [], {"a": NOW + 1}, {}, ["ask b"]),
        (1, [], {"a": NOW - 1}, {}, ["ask a"]),
        (1, [], {"a": NOW + 1, "b": NOW + 1, "c": NOW + 1}, {}, []),
        (1, [there("x", State.WAITING)], {}, {}, []),
        (1, [there("x", State.READY)], {}, {}, []),
        (1, [there("x", State.GOING)], {}, {}, []),  # it still counts against the quota
        (1, [there("x", State.LOST, why="preempted")], {}, {}, ["back x: preempted"]),
        (1, [there("x", State.WAITING, since=NOW - 200)], {}, {}, ["back x: no capacity in a within 200 s"]),
        (1, [there("x", State.WAITING, since=NOW - 200)], {"b": NOW + 1, "c": NOW + 1}, {}, []),
        (1, [there("x", State.WAITING, since=NOW - 200, found=True)], {}, {}, []),  # it is being made
        (1, [there("x", State.READY, since=NOW - 200)], {}, {}, []),
        (1, [there("x", State.READY)], {}, {"x": "a bad chip"}, ["back x: a bad chip"]),
        (
            1,
            [there("x", State.READY, slice="v5p-8")],
            {},
            {},
            ["back x: is 1 x v5p-8 of 2x2x2, wanted is 1 x v5p-16 of 2x2x2"],
        ),
        (1, [there("x", State.READY, owner="other"), there("y", State.LOST, owner="other")], {}, {}, ["ask a"]),
        (2, [there("x", State.READY, zone="b")], {}, {}, ["ask b"]),
        (2, [there("x", State.READY, zone="b")], {"b": NOW + 1}, {}, []),  # its slices lie in one zone
        (3, [there("x", State.READY), there("y", State.GOING)], {}, {}, ["ask a"]),
        (1, [there("x", State.READY), there("y", State.WAITING)], {}, {}, ["back y: is not wanted"]),
        (
            0,
            [there("x", State.READY), there("y", State.WAITING)],
            {},
            {},
            ["back y: is not wanted", "back x: is not wanted"],
        ),
        (0, [], {}, {}, []),
    ],
)
def test_what_is_done(
    count: int, requests: list[Request], turned_down: dict[str, float], bad: dict[str, str], expected: list[str]
) -> None:
    assert told(reconcile(replace(WANTED, count=count), requests, turned_down, bad, NOW)) == expected


def test_from_any_state_it_ends_with_what_is_wanted_and_nothing_more() -> None:
    """A cloud of dice: requests come to be, fail and are lost; what is another's is never given back."""
    dice = random.Random(0)
    for _ in range(200):
        wanted = replace(WANTED, count=dice.randint(0, 4))
        cloud = {f"old-{i}": there(f"old-{i}", dice.choice(list(State))) for i in range(dice.randint(0, 5))}
        others = {f"other-{i}": there(f"other-{i}", dice.choice(list(State)), owner="else") for i in range(3)}
        for look in range(60):
            found = reconcile(wanted, [*cloud.values(), *others.values()], {}, {}, NOW + look)
            for one in found:
                if isinstance(one, Create):
                    assert one.name not in cloud
                    cloud[one.name] = there(one.name, State.WAITING, since=NOW + look, zone=one.zone)
                else:
                    assert one.request.owner == "run"
                    cloud[one.request.name] = replace(one.request, state=State.GOING)
            for name, one in list(cloud.items()):
                if one.state is State.GOING:
                    del cloud[name]
                elif one.state is State.WAITING:
                    fails = look < 40 and dice.random() < 0.2
                    cloud[name] = replace(one, state=State.LOST if fails else State.READY)
            assert len(cloud) <= max(wanted.count, 5)
        assert [one.state for one in cloud.values()] == [State.READY] * wanted.count


@pytest.mark.parametrize("owner", ["tiny-1", "Tiny_1", "tiny_1", "TINY-1", "x" * 64, "x" * 63 + "y", "_", "a-"])
def test_an_owner_is_a_label_and_part_of_a_name(owner: str) -> None:
    label, name = owner_label(owner), request_name(owner, 1.8e9, 4095)
    assert all(c.islower() or c.isdigit() or c == "-" for c in label + name)
    assert len(label) <= 30
    assert len(name) <= 61
    assert name.startswith("gemma-")
    assert name[-1] != "-"


def test_no_two_owners_have_one_label() -> None:
    owners = ["tiny-1", "Tiny-1", "tiny_1", "tiny--1", "x" * 64, "x" * 63 + "y", "x" * 30]
    assert len({owner_label(owner) for owner in owners}) == len(owners)
