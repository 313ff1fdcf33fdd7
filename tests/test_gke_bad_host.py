"""A host whose chips are bad is replaced, its slice with it: against the emulator, with no hosts behind the pods."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.placement import Spot
from orchestrator.slices import gke, upkeep
from orchestrator.slices.raycluster import avoiding
from orchestrator.slices.upkeep import Upkeep
from tests.kube import Kube, Made
from tests.pods import Pod
from tests.test_gke import TWO_SLICES, config, keeping, ready, serving, wait

WHY = "chip 0 multiplies wrong"
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


@contextmanager
def two_slices(told: list[str], **settings: Any) -> Iterator[tuple[Kube, Made, Upkeep, Any]]:
    with serving(**({"heeds": True} | settings)) as emulated:
        emulated.dice.seed(8)
        with keeping(config(emulated, *TWO_SLICES), told=told) as (kept, check):
            wait(check, ready(kept))
            (one,) = emulated.made.values()
            yield emulated, one, kept, check


def spot(pod: Pod, node_id: str = "bad") -> Spot:
    return Spot("v5p-16-1", 1, node_id, pod.ip)


def names(pods: list[Pod]) -> list[str]:
    return [pod.name for pod in pods]


def anew(one: Made, before: list[Pod]) -> Callable[[], bool]:
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
        wait(check, anew(one, before))
        after = names(one.slices[1])
        (term,) = one.group["template"]["spec"]["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
        off = sorted(pod.node for pod in before)
        assert term["matchExpressions"] == [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": off}]
        assert not {pod.node for pod in one.slices[1]} & {*off}
        assert names(one.slices[0]) == sound
        upkeep.discard(kept, spot(one.slices[1][1]), WHY)  # told of once more; by now another has its address
        looks = len(emulated.calls)
        wait(check, lambda: len(emulated.calls) > looks + 20)
        assert names(one.slices[1]) == after
    (line,) = (line for line in told if line.endswith(WHY))
    done = f"its slice is made anew, and keeps off {', '.join(off)}", "is gone by now"  # the answer was lost
    assert line in [f"host {before[1].ip}: {one}: {WHY}" for one in done[: 2 if trouble else 1]]


@pytest.mark.parametrize(("denied", "kind"), [("patch", "rayclusters"), ("deletecollection", "pods")])
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
        wait(check, anew(one, before))
        wait(check, lambda: any(f"keeps off {before[0].node}, {before[1].node}" in line for line in told))


def test_a_host_that_left_the_ray_cluster_is_not_looked_for_by_its_address() -> None:
    told: list[str] = []
    with serving() as emulated:
        kept = gke.upkeep(config(emulated), "mine", alive=lambda node_id: node_id != "gone")
        with upkeep.kept(kept, False, lambda what, news: told.append(news)) as given:
            wait(given.repair, ready(kept))
            (one,) = emulated.made.values()
            before = names(one.slices[0])
            upkeep.discard(kept, spot(one.slices[0][0], "gone"), WHY)
            wait(given.repair, lambda: "gone" in kept.replaced)
            assert names(one.slices[0]) == before
            assert "affinity" not in one.group["template"]["spec"]


def test_where_what_the_raycluster_asks_for_is_not_heeded_that_is_said() -> None:
    told: list[str] = []
    with two_slices(told, heeds=False) as (emulated, one, kept, check):
        for node_id in ("bad", "bad again"):
            before = one.slices[1]
            upkeep.discard(kept, spot(before[1], node_id), WHY)
            wait(check, anew(one, before))
            assert [pod.node for pod in one.slices[1]] == [pod.node for pod in before]
        first, second = (line for line in told if line.endswith(WHY))
        assert "keeps off" in first
        assert f"its slice on {before[0].node}, {before[1].node} is made anew; its RayCluster keeps off them" in second
        assert f"not heeded: kubectl cordon them: {WHY}" in second


def test_nodes_are_kept_off_besides_those_before_and_what_else_was_asked_for() -> None:
    pool = {"key": "cloud.google.com/gke-nodepool", "operator": "In", "values": ["a", "b"]}
    given = {
        "podAffinity": {"x": 1},
        "nodeAffinity": {"preferred": [2], REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [pool]}, {}]}},
    }
    made = avoiding(avoiding(given, ["n2", "n1"]), ["n3", "n1"])
    off = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["n1", "n2", "n3"]}
    terms = [{"matchExpressions": [pool, off]}, {"matchExpressions": [off]}]  # each by itself lets a pod in
    assert made == {
        "podAffinity": {"x": 1},
        "nodeAffinity": {"preferred": [2], REQUIRED: {"nodeSelectorTerms": terms}},
    }
    assert given["nodeAffinity"][REQUIRED] == {"nodeSelectorTerms": [{"matchExpressions": [pool]}, {}]}
