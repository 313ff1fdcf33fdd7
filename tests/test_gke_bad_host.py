"""A host whose chips are bad is replaced, its slice with it: against the emulator, with no hosts behind the pods."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.hosts.placement import Spot
from orchestrator.slices import gke, upkeep
from orchestrator.slices.raycluster import raycluster, sentry
from orchestrator.slices.upkeep import Upkeep
from tests.kube import Kube, Made
from tests.pods import Pod
from tests.test_config import config_of
from tests.test_gke import TWO_SLICES, config, keeping, ready, serving, wait

WHY = "chip 0 multiplies wrong"


@contextmanager
def two_slices(told: list[str], **settings: Any) -> Iterator[tuple[Kube, Made, Upkeep, Any]]:
    with serving(**settings) as emulated:
        emulated.dice.seed(8)
        with keeping(config(emulated, *TWO_SLICES), told=told) as (kept, check):
            wait(check, ready(kept))
            (one,) = emulated.made.values()
            yield emulated, one, kept, check


def spot(pod: Pod, node_id: str = "bad") -> Spot:
    return Spot("v5p-16-1", 1, node_id, pod.ip)


def names(pods: list[Pod]) -> list[str]:
    return [pod.name for pod in pods]


def again(one: Made, before: list[Pod]) -> Callable[[], bool]:
    """Whether the second slice has been made again."""
    return lambda: bool(there := one.slices.get(1, [])) and not {*names(there)} & {*names(before)}


@pytest.mark.parametrize("trouble", [0.0, 0.4])
def test_the_slice_of_a_bad_host_is_made_anew_on_other_nodes_and_only_it(trouble: float) -> None:
    told: list[str] = []
    with two_slices(told, trouble=trouble) as (emulated, one, kept, check):
        sound, before = names(one.slices[0]), one.slices[1]
        for _ in range(2):  # as often as the run waits for hosts
            upkeep.discard(kept, spot(before[1]), WHY)
        wait(check, lambda: any(line.endswith(WHY) for line in told))
        wait(check, again(one, before))
        after = names(one.slices[1])
        assert [pod["spec"]["nodeName"] for pod in one.sentries] == [before[1].node]
        assert not {pod.node for pod in one.slices[1]} & {pod.node for pod in before}
        assert names(one.slices[0]) == sound
        upkeep.discard(kept, spot(one.slices[1][1]), WHY)  # told of once more; by now another has its address
        looks = len(emulated.calls)
        wait(check, lambda: len(emulated.calls) > looks + 20)
        assert names(one.slices[1]) == after
    (line,) = (line for line in told if line.endswith(WHY))
    done = f"its slice is made again, and keeps off {before[1].node}", "is gone by now"  # the answer was lost
    assert line in [f"host {before[1].ip}: {one}: {WHY}" for one in done[: 2 if trouble else 1]]


@pytest.mark.parametrize(("denied", "kind"), [("create", "pods"), ("deletecollection", "pods")])
def test_what_is_not_permitted_is_told_once_and_done_once_it_is(denied: str, kind: str) -> None:
    told: list[str] = []
    with two_slices(told) as (emulated, one, kept, check):
        before = one.slices[1]
        emulated.settings = replace(emulated.settings, denied=denied)
        upkeep.discard(kept, spot(before[0]), WHY)
        said = f'cannot be replaced now: 403 Forbidden: {kind} is forbidden: User "me" cannot {denied}'
        wait(check, lambda: any(line.startswith(f"host {before[0].ip}: {said}") for line in told))
        looks = len(emulated.calls)
        wait(check, lambda: len(emulated.calls) > looks + 20)
        assert sum("cannot be replaced now" in line for line in told) == 1
        assert names(one.slices[1]) == names(before)
        emulated.settings = replace(emulated.settings, denied="")
        wait(check, again(one, before))
        wait(check, lambda: any(f"keeps off {before[0].node}" in line for line in told))


def test_a_host_that_left_the_ray_cluster_is_not_looked_for_by_its_address() -> None:
    told: list[str] = []
    with serving() as emulated:
        kept = gke.upkeep(config(emulated), "mine", alive=lambda node_id: node_id != "gone")
        with upkeep.managed(kept, False, lambda what, news: told.append(news)) as given:
            wait(given.repair, ready(kept))
            (one,) = emulated.made.values()
            before = names(one.slices[0])
            upkeep.discard(kept, spot(one.slices[0][0], "gone"), WHY)
            wait(given.repair, lambda: "gone" in kept.replaced)
            assert names(one.slices[0]) == before
            assert one.sentries == []


@pytest.mark.parametrize(
    ("kind", "key"), [("v5p-16", "cloud.google.com/gke-nodepool"), ("v5p-8", "kubernetes.io/hostname")]
)
def test_a_sentry_keeps_off_the_pool_of_a_slice_or_a_host_by_itself(kind: str, key: str) -> None:
    given = config_of("cluster=gke", "cluster.gke.image=x", "cluster.gke.claim=x", f"cluster.slice={kind}")
    asked = raycluster(given.cluster, gke.section(given), "mine", "gemma-mine")
    asked["metadata"]["uid"] = "1"
    pod = sentry(asked, "n1")
    assert pod["metadata"]["name"] == sentry(asked, "n1")["metadata"]["name"] != sentry(asked, "n2")["metadata"]["name"]
    assert pod["spec"]["nodeName"] == "n1"
    (term,) = pod["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    hosts = {"ray.io/cluster": "gemma-mine", "ray.io/node-type": "worker"}  # not the head, nobody else's
    assert term == {"labelSelector": {"matchLabels": hosts}, "topologyKey": key}
