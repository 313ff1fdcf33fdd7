"""Several replicas behind one address: who computes a request, what a lost replica had, how many there are."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from gemma.config import ConfigError, Replicas
from launch.weights import defaults
from orchestrator import config as configs
from orchestrator.hosts.ready import Load
from orchestrator.programs.replicas import Trend, wanted_replicas
from orchestrator.serving import front
from orchestrator.serving import router as routers
from orchestrator.serving.router import Replica, Router
from tests.test_front import GOOD, config, drive, post, wait_idle
from tests.test_schedule import LIMITS

PLACES = replace(LIMITS, slots=4, global_pages=400, local_pages=200)
SETTINGS = Replicas(1, 3, up_s=10, down_s=100)


class Fleet:
    """Replicas that come and go, with stand-ins for their devices."""

    def __init__(self, router: Router):
        self.router = router
        self.over: dict[int, tuple[Replica, threading.Event, threading.Thread]] = {}

    def rise(self, number: int, steps_s: float) -> Replica:
        replica, over = routers.open_replica(self.router, [PLACES]), threading.Event()
        thread = threading.Thread(target=drive, args=(self.router, replica, over, steps_s), daemon=True)
        self.over[number] = replica, over, thread
        thread.start()
        return replica

    def fall(self, number: int) -> None:
        replica, over, thread = self.over.pop(number)
        over.set()
        thread.join(10)
        routers.close_replica(self.router, replica)


@contextmanager
def served() -> Iterator[tuple[str, Router, Fleet]]:
    of = config()
    assert of.serve is not None
    router = Router(of.serve.queue)
    fleet = Fleet(router)
    with front.served(of, router) as address:
        yield address, router, fleet
        for number in list(fleet.over):
            fleet.fall(number)


def ask(address: str, count: int, tokens: int) -> list[tuple[int, Any]]:
    """Answers of so many clients at once, each with a prompt of its own."""
    found: dict[int, tuple[int, Any]] = {}

    def one(number: int) -> None:
        body = GOOD | {"max_tokens": tokens, "messages": [{"role": "user", "content": f"Question {number}"}]}
        found[number] = post(address, body)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[number] for number in range(count)]


def texts(answers: list[tuple[int, Any]]) -> list[str]:
    assert all(code == 200 for code, _ in answers), answers
    return [json.loads(found)["choices"][0]["message"]["content"] for _, found in answers]


def test_replicas_share_the_requests_and_change_none() -> None:
    with served() as (address, router, fleet):
        one = fleet.rise(0, 0.001)
        alone = texts(ask(address, 12, 20))
        other = fleet.rise(1, 0.001)
        before = one.measured.tokens
        assert texts(ask(address, 12, 20)) == alone
        shares = one.measured.tokens - before, other.measured.tokens
        assert min(shares) > 0.25 * sum(shares), shares
        wait_idle(router)


def test_what_a_lost_replica_had_goes_on_at_another() -> None:
    with served() as (address, router, fleet):
        fleet.rise(0, 0.001)
        alone = texts(ask(address, 8, 40))
        fleet.fall(0)
        for number in (0, 1):
            fleet.rise(number, 0.01)
        found: list[list[str]] = []
        asking = threading.Thread(target=lambda: found.append(texts(ask(address, 8, 40))))
        asking.start()
        deadline = time.monotonic() + 10
        while fleet.over[1][0].measured.tokens < 20:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert fleet.over[1][0].held() > 0
        fleet.fall(1)
        asking.join(60)
        assert found == [alone]
        wait_idle(router)


def test_a_replica_that_does_not_move_keeps_nobody_waiting_who_has_not_begun() -> None:
    with served() as (address, router, fleet):
        stuck = routers.open_replica(router, [PLACES])  # stands, and takes nothing
        fleet.rise(0, 0.001)
        began = time.monotonic()
        texts(ask(address, 8, 4))
        assert time.monotonic() - began < 5
        routers.close_replica(router, stuck)
        wait_idle(router)


def test_a_draining_replica_takes_nothing_that_another_could_and_the_last_one_leaves_nobody_behind() -> None:
    with served() as (address, router, fleet):
        one, other = fleet.rise(0, 0.001), fleet.rise(1, 0.001)
        other.draining = True
        texts(ask(address, 8, 10))
        assert other.measured.tokens == 0
        assert routers.is_done(router, other)
        one.draining = True
        assert post(address, GOOD)[0] == 503  # nobody takes what is new
        assert not router.stands


def test_requests_are_taken_in_the_order_they_came() -> None:
    router = Router(100)
    replica = routers.open_replica(router, [PLACES])

    async def come() -> None:
        for _ in range(9):
            routers.submit(router, routers.new_sequences(router, (1, 2), 1, routers.Sampling(), 4, ()))

    asyncio.run(come())
    routers.take(router, replica)
    assert [number for number, _ in replica.batches[0].waiting] == [0, 1, 2, 3]
    assert [number for number, *_ in sorted(router.waiting[0])] == [4, 5, 6, 7, 8]


def wanted(count: int, load: Load, trend: Trend, now: float) -> int:
    return wanted_replicas(SETTINGS, count, load, trend, now)


def test_one_more_is_wanted_once_requests_have_waited_and_all_stand() -> None:
    trend, crowded = Trend(), Load(running=4, waiting=1, slots=4, standing=1)
    assert [wanted(1, crowded, trend, now) for now in (1.0, 5.0, 10.9, 11.0)] == [1, 1, 1, 2]
    assert wanted(2, crowded, trend, 100.0) == 2  # the second does not stand yet
    full = Load(running=12, waiting=9, slots=12, standing=3)
    assert [wanted(3, full, trend, now) for now in (200.0, 300.0)] == [3, 3]  # no more than max


def test_a_moment_without_waiting_begins_the_count_anew() -> None:
    trend, crowded, calm = Trend(), Load(4, 1, 4, 1), Load(4, 0, 4, 1)
    assert [wanted(1, load, trend, now) for load, now in ((crowded, 1.0), (calm, 9.0), (crowded, 12.0))] == [1, 1, 1]
    assert wanted(1, crowded, trend, 22.0) == 2


def test_one_fewer_is_wanted_once_the_rest_would_have_had_room_to_spare() -> None:
    trend, idle = Trend(), Load(running=2, waiting=0, slots=8, standing=2)
    assert [wanted(2, idle, trend, now) for now in (1.0, 100.0, 101.0)] == [2, 2, 1]
    assert [wanted(1, Load(0, 0, 4, 1), trend, now) for now in (200.0, 400.0)] == [1, 1]  # no fewer than min
    busy = Load(running=3, waiting=0, slots=8, standing=2)
    assert [wanted(2, busy, trend, now) for now in (500.0, 700.0)] == [2, 2]


def test_what_gave_up_is_not_begun_again_and_again() -> None:
    settings = replace(SETTINGS, min=2)
    assert wanted_replicas(settings, 1, Load(4, 9, 4, 1), Trend(crowded=1.0), 100.0) == 1


def of(*overrides: str) -> configs.Config:
    container = defaults(list(overrides), "serve")
    return configs.from_container(container)


def test_a_number_of_replicas_is_a_minimum_and_a_maximum() -> None:
    both = [of("serve.replicas=3").serve, of("serve.replicas.max=4").serve]
    assert [(one.replicas.min, one.replicas.max) for one in both if one] == [(3, 3), (1, 4)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["serve.replicas=0"], "serve.replicas.min=0: must be at least 1"),
        (["serve.replicas.min=2"], "serve.replicas.max=1: must lie in serve.replicas.min=2..1024"),
        (["serve.replicas=two"], "serve.replicas=two: must be a whole number, or a section"),
        (["serve.replicas=true"], "serve.replicas=True: must be a whole number, or a section"),
        (["cluster.num_slices=2"], "cluster.num_slices=2: a server's replica is one slice; give serve.replicas=2"),
        (["serve.replicas.down_s=0"], "serve.replicas.down_s=0: must be above 0"),
    ],
)
def test_replicas_that_cannot_be_are_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        of(*overrides)
    assert said in str(refused.value)


def test_the_list_of_slices_of_gke_has_a_fixed_number() -> None:
    with pytest.raises(ConfigError, match=r"serve.replicas.max: cluster=gke asks for all slices as one object"):
        of("cluster=gke", "serve.replicas.max=2", "run.root=/mnt/runs")
