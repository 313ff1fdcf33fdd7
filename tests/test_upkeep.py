"""What keeps slices as they are wanted, against a provider that is a list: what it must not lose, and not give up."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from gemma.config import ConfigError
from orchestrator.hosts import placement
from orchestrator.interrupt import Interrupt
from orchestrator.slices import upkeep
from orchestrator.slices.upkeep import NoSlicesError, Provider, RefusedError, Upkeep
from orchestrator.slices.wanted import Create, Request, State, Wanted
from tests.test_config import config_of

WANTED = Wanted("mine", "v5p-16", "2x2x2", 1, ("a", "b"))


@dataclass
class Cloud:
    """Slices are there at once; `refuses` is asked first."""

    there: dict[str, Request] = field(default_factory=dict)
    refuses: Callable[[Create], None] = lambda asked: None
    looks_blank: int = 0  # so many looks show nothing

    def create(self, asked: Create) -> None:
        self.refuses(asked)
        self.there[asked.name] = request(asked.name, asked.zone)

    def list_requests(self) -> list[Request]:
        self.looks_blank -= 1
        return [] if self.looks_blank >= 0 else list(self.there.values())

    def delete(self, one: Request) -> None:
        self.there.pop(one.name, None)


def request(name: str, zone: str = "a") -> Request:
    return Request(name, zone, "mine", State.READY, "v5p-16", "2x2x2", 0.0)


def keeping(cloud: Cloud, wanted: Wanted = WANTED) -> Upkeep:
    joined = cloud.there.keys
    return Upkeep(wanted, Provider(cloud.list_requests, cloud.create, cloud.delete, lambda: set(joined())), 0.01, 60.0)


def quiet(what: str, news: str) -> None:
    pass


def test_an_impatient_user_leaves_nothing_behind() -> None:
    cloud = Cloud()

    def delete(one: Request) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # it comes amid this
        cloud.there.pop(one.name)

    kept = keeping(cloud)
    kept.provider = replace(kept.provider, delete=delete)

    def stop_twice() -> None:
        with upkeep.managed(kept, False, quiet):
            assert cloud.there
            os.kill(os.getpid(), signal.SIGINT)

    with Interrupt(), pytest.raises(KeyboardInterrupt):
        stop_twice()
    assert cloud.there == {}


def test_nor_one_who_is_impatient_while_the_first_is_asked_for() -> None:
    cloud = Cloud()

    def slow(asked: Create) -> None:
        if cloud.there:
            raise KeyboardInterrupt

    cloud.refuses = slow
    with pytest.raises(KeyboardInterrupt), upkeep.managed(keeping(cloud, replace(WANTED, count=2)), False, quiet):
        pass
    assert cloud.there == {}


def test_what_was_asked_for_unheard_is_looked_for_more_than_once() -> None:
    cloud = Cloud()

    def unheard(asked: Create) -> None:
        cloud.there[asked.name] = request(asked.name)
        cloud.looks_blank = 2
        raise RefusedError("trouble", "no answer")

    cloud.refuses = unheard
    kept = keeping(cloud)
    kept.poll_s = 0.3  # the thread does not come to look
    with upkeep.managed(kept, False, quiet):
        pass
    assert cloud.there == {}


@pytest.mark.parametrize("kind", ["quota", "forbidden"])
def test_a_refusal_ends_a_run_that_never_had_its_slices_and_no_other(kind: str) -> None:
    def refuse(asked: Create) -> None:
        raise RefusedError(kind, "no")  # type: ignore[arg-type]

    fresh = keeping(Cloud(refuses=refuse), replace(WANTED, zones=("a",)))
    with pytest.raises((NoSlicesError, ConfigError)):
        upkeep.step(fresh)
    cloud = Cloud()
    later = keeping(cloud, replace(WANTED, zones=("a",)))
    upkeep.step(later)
    upkeep.step(later)
    cloud.there.clear()
    cloud.refuses = refuse
    upkeep.step(later)  # raises nothing
    assert any(what == "a" and kind in news for what, news in later.news)


@pytest.mark.parametrize(("keep", "left"), [(False, 0), (True, 1)])
def test_a_lost_head_gives_back_what_is_not_kept(monkeypatch: pytest.MonkeyPatch, keep: bool, left: int) -> None:
    """By the upkeep's own thread: Ray may end this process before the run's comes to it."""
    monkeypatch.setattr(upkeep, "HEAD_SILENT_S", 0.2)
    cloud, silent = Cloud(), time.monotonic() + 0.1
    kept = keeping(cloud)
    kept.head_answers = lambda: time.monotonic() < silent
    with upkeep.managed(kept, keep, quiet) as given:
        deadline = time.monotonic() + 10.0
        while kept.failed is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(cloud.there) == left
        with pytest.raises(NoSlicesError, match="the head of the Ray cluster has not answered"):
            given.repair()


def test_a_head_that_is_silent_for_a_moment_is_not_lost() -> None:
    cloud, answers = Cloud(), iter([False, True, False])
    kept = keeping(cloud)
    kept.head_answers = lambda: next(answers)
    upkeep.step(kept)
    for silent in (True, False, True):
        upkeep.watch_head(kept)
        assert (kept.silent_since is not None) is silent
    assert cloud.there


def test_a_quota_said_long_ago_is_no_verdict() -> None:
    def refuse(asked: Create) -> None:
        raise RefusedError("quota", "no")

    kept = keeping(Cloud(refuses=refuse))
    kept.quotas["b"], kept.turned_down["b"] = "no", 1.0  # its time is over
    upkeep.step(kept)
    with pytest.raises(NoSlicesError):
        upkeep.step(kept)


@pytest.mark.parametrize(
    "wanted", [replace(WANTED, slice="v5p-32", topology="2x2x4"), replace(WANTED, count=1)], ids=["type", "count"]
)
def test_what_is_kept_under_a_name_is_not_replaced_by_the_way(wanted: Wanted) -> None:
    cloud = Cloud({name: request(name) for name in ("x", "y")})
    with pytest.raises(ConfigError, match="cluster.name=mine: holds 2 x 1 x v5p-16 of 2x2x2"):
        upkeep.step(keeping(cloud, replace(wanted, named=True)))
    assert set(cloud.there) == {"x", "y"}


def test_a_run_takes_its_own_slices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {
            "Alive": True,
            "NodeID": f"{name}-{worker}",
            "NodeManagerAddress": "127.0.0.1",
            "Labels": {placement.NAME_LABEL: name, placement.RANK_LABEL: str(worker), placement.TYPE_LABEL: "v5p-16"},
        }
        for name in ("mine", "theirs")
        for worker in range(2)
    ]
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(placement, "draining", set)
    monkeypatch.setattr(placement, "available_resources_per_node", lambda: {n["NodeID"]: {"TPU": 4.0} for n in nodes})
    count, free = placement.usable_slices(config_of(), (), lambda name: name == "mine")
    assert (count, [spots[0].slice_name for spots in free]) == (1, ["mine"])
