"""Slices of the Cloud TPU API, by Google's own client against the emulator: no hosts behind them here."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.hosts.placement import Spot
from orchestrator.slices import cloud, gcp, upkeep
from orchestrator.slices.upkeep import NoSlicesError, Upkeep
from orchestrator.slices.wanted import State
from tests import cloud_tpu
from tests.cloud import Cloud, Settings, States, preempt
from tests.test_config import config_of

ZONES = ("us-east5-a", "us-central1-a", "europe-west4-b")
DEADLINE_S = 20.0
MESH = ("mesh.replica=96", "mesh.fsdp=64", "train.batch=6144")


def config(emulated: Cloud, *overrides: str) -> Config:
    address = f"cluster.gcp.endpoint={emulated.endpoint}"
    return config_of("cluster=gcp", address, "cluster.gcp.poll_s=0.02", "run.id=mine", *overrides)


@contextmanager
def serving(**settings: Any) -> Iterator[Cloud]:
    with cloud_tpu.serve(Settings(**({"provision_s": 0.1, "delete_s": 0.1, "hosts": False} | settings))) as emulated:
        yield emulated


def ready(kept: Upkeep, count: int = 1) -> Callable[[], bool]:
    return lambda: sum(state is State.READY for state in kept.states.values()) >= count


def wait(check: Callable[[], None], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline
        check()
        time.sleep(0.01)


@contextmanager
def keeping(config: Config, keep: bool = False, told: list[str] | None = None) -> Iterator[tuple[Upkeep, Any]]:
    kept = cloud.upkeep(config, "mine")
    say = lambda what, news: told.append(f"{what}: {news}") if told is not None else None  # noqa: E731
    with upkeep.managed(kept, keep, say) as given:
        yield kept, given.repair


def zones(emulated: Cloud) -> list[str]:
    return [name.split("/")[3] for name in sorted(emulated.given)]


def test_a_slice_is_asked_for_as_the_config_says_and_given_back_at_the_end() -> None:
    overrides = [
        "cluster.slice=v5p-128",
        "train.batch=64",
        "cluster.capacity=spot",
        "cluster.gcp.service_account=me@x",
        "cluster.gcp.network=net",
    ]
    with serving() as emulated:
        with keeping(config(emulated, *overrides)) as (kept, check):
            wait(check, ready(kept))
            (one,) = emulated.given.values()
            node = one.resource.tpu.node_spec[0].node
            assert (node.accelerator_type, node.runtime_version) == ("v5p-128", "v2-alpha-tpuv5")
            assert (node.network_config.network, node.service_account.email) == ("net", "me@x")
            assert "spot" in one.resource
            assert node.labels["gemma-owner"] == node.metadata["gemma-owner"] == "mine"
            assert one.resource.queueing_policy.valid_until_duration.total_seconds() == 24 * 3600
        assert emulated.given == {}


def test_another_topology_is_asked_for_by_its_shape() -> None:
    with serving() as emulated:
        large = config(emulated, "cluster.slice=v5p-12288", "cluster.topology=8x24x32", *MESH)
        with keeping(large) as (kept, check):
            wait(check, ready(kept))
            node = next(iter(emulated.given.values())).resource.tpu.node_spec[0].node
            assert (node.accelerator_type, node.accelerator_config.topology) == ("", "8x24x32")
            assert node.accelerator_config.type_.name == "V5P"


@pytest.mark.parametrize("empty", ["wait", "fail"])
def test_a_stock_out_in_two_zones_and_the_third_is_used(empty: str) -> None:
    with serving(stock=dict.fromkeys(ZONES[:2], 1), empty=empty) as emulated:
        with keeping(config(emulated, "cluster.gcp.patience_s=0.5")) as (kept, check):
            wait(check, ready(kept))
            assert emulated.active_at.keys() == {name.rpartition("/")[2] for name in emulated.given}
            assert zones(emulated) == [ZONES[2]]
        assert emulated.given == {}


def test_where_no_quota_allows_it_that_is_said_once_with_its_name_and_nothing_is_left() -> None:
    with serving(quota=ZONES) as emulated:
        with keeping(config(emulated)) as (kept, check), pytest.raises(NoSlicesError) as said:
            wait(check, ready(kept))
        assert "TPUV5sPodPerProjectPerZoneForTPUAPI" in str(said.value)
        assert emulated.given == {}
        asked = [verb for _, verb in emulated.calls if verb == "CreateQueuedResource"]
        assert len(asked) == len(ZONES)


def test_a_zone_without_quota_is_passed_over() -> None:
    with serving(quota=ZONES[:1]) as emulated, keeping(config(emulated)) as (kept, check):
        wait(check, ready(kept))
        assert zones(emulated) == [ZONES[1]]


@pytest.mark.parametrize("verb", ["ListQueuedResources", "CreateQueuedResource"])
def test_what_is_not_permitted_is_the_users_matter(verb: str) -> None:
    with serving(denied=verb) as emulated:
        with pytest.raises(ConfigError, match="denied"), keeping(config(emulated)) as (kept, check):
            wait(check, ready(kept))
        assert emulated.given == {}


def test_what_is_preempted_is_deleted_and_asked_for_again() -> None:
    with serving(notice_s=0.1) as emulated, keeping(config(emulated)) as (kept, check):
        wait(check, ready(kept))
        (first,) = emulated.given
        with emulated.lock:
            preempt(emulated, emulated.given[first])
        wait(check, lambda: first not in emulated.given and ready(kept)())
        gone = next(i for i, line in enumerate(emulated.log) if line.endswith("gone"))
        assert sum("ACCEPTED" in line for line in emulated.log[:gone]) == 1  # not before the quota is free again


def test_it_gets_there_through_500s_and_time_outs_and_leaves_nothing() -> None:
    with serving(trouble=0.4) as emulated:
        with keeping(config(emulated, "cluster.num_slices=3", "mesh=multislice", "train.batch=24")) as (kept, check):
            wait(check, ready(kept, 3))
            wait(check, lambda: len(emulated.given) == 3)
        assert emulated.given == {}


def test_slices_that_are_kept_are_taken_up_again_by_name() -> None:
    with serving() as emulated:
        with keeping(config(emulated), keep=True) as (kept, check):
            wait(check, ready(kept))
        (there,) = emulated.given
        with keeping(config(emulated)) as (kept, check):
            wait(check, ready(kept))
            assert list(emulated.given) == [there]
        assert emulated.given == {}


def test_a_slice_whose_hosts_do_not_join_is_given_back_for_another() -> None:
    with serving() as emulated:
        kept = cloud.upkeep(config(emulated, "cluster.gcp.rejoin_s=0.3"), "mine", joined=set)
        told: list[str] = []
        with upkeep.managed(kept, False, lambda what, news: told.append(news)) as given:
            wait(given.repair, lambda: sum("its hosts are not in the Ray cluster" in line for line in told) >= 2)
            assert len(emulated.given) <= 1


def test_a_slice_with_a_bad_host_is_given_back_for_another_and_only_it() -> None:
    two = ["cluster.num_slices=2", "mesh=multislice", "train.batch=16"]
    with serving() as emulated, keeping(config(emulated, *two)) as (kept, check):
        wait(check, ready(kept, 2))
        bad, sound = sorted(name.rpartition("/")[2] for name in emulated.given)
        for _ in range(2):  # as often as the run waits for hosts
            upkeep.discard(kept, Spot(bad, 1, "node", "10.0.0.2"), "chip 0 multiplies wrong")
        wait(check, lambda: bad not in kept.states and ready(kept, 2)())
        assert sound in kept.states
        assert len(emulated.active_at) == 3


def test_nobody_elses_is_touched() -> None:
    with serving() as emulated:
        other = cloud.upkeep(config(emulated), "other")
        with upkeep.managed(other, True, lambda *_: None) as given:
            wait(given.repair, ready(other))
        (theirs,) = emulated.given
        with keeping(config(emulated)) as (kept, check):
            wait(check, ready(kept))
        assert list(emulated.given) == [theirs]
        assert (
            upkeep.clear(cloud.open_provider(config(emulated), ""), "mine", 0.01, lambda *_: None, patient=True) == []
        )
        assert list(emulated.given) == [theirs]


def test_a_request_that_lapses_is_seen_as_lost_with_its_reason() -> None:
    with serving(stock={ZONES[0]: 0}, empty="fail") as emulated:
        api = gcp.api(replace(config(emulated).cluster.gcp, endpoint=emulated.endpoint))  # type: ignore[type-var]
        told: list[str] = []
        with keeping(config(emulated), told=told) as (kept, check):
            wait(check, ready(kept))
        assert any("lost in us-east5-a: failed: There is no more capacity" in line for line in told)
        assert gcp.list_requests(api, ZONES) == []
        assert States.ACTIVE
