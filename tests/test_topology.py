"""Slices: what a name means, and which of a cluster's nodes make a whole one."""

from typing import Any

import pytest

from gemma.config import ConfigError
from orchestrator.hosts.group import multislice_env
from orchestrator.hosts.placement import Placement, Spot, free_slices, whole_slices
from orchestrator.slices.topology import NAME_LABEL, RANK_LABEL, TOPOLOGIES, TYPE_LABEL, slice_type


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts"),
    [
        ("v5p-8", "2x2x1", 4, 1),
        ("v5p-16", "2x2x2", 8, 2),
        ("v5p-32", "2x2x4", 16, 4),
        ("v5p-64", "2x4x4", 32, 8),
        ("v5p-128", "4x4x4", 64, 16),
        ("v5p-256", "4x4x8", 128, 32),
        ("v5p-512", "4x8x8", 256, 64),
        ("v5p-1024", "8x8x8", 512, 128),
        ("v5p-2048", "8x8x16", 1024, 256),
        ("v5p-4096", "8x16x16", 2048, 512),
        ("v5p-8192", "16x16x16", 4096, 1024),
        ("v5p-12288", "16x16x24", 6144, 1536),
    ],
)
def test_a_slice_name_counts_cores_two_a_chip_four_chips_a_host(
    name: str, topology: str, chips: int, hosts: int
) -> None:
    found = slice_type(name)
    assert (found.topology, found.chips, found.hosts) == (topology, chips, hosts)
    assert int(name.removeprefix("v5p-")) == 2 * chips


@pytest.mark.parametrize("name", ["v5p-17", "v4-8", "", "v5p-16384"])
def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster.slice={name}: no such slice; allowed: {', '.join(TOPOLOGIES)}"):
        slice_type(name)


def node(slice_name: str, worker: int, alive: bool = True, kind: str = "v5p-16") -> dict[str, Any]:
    """A node as ray.nodes() tells of it."""
    name = f"{slice_name}-{worker}"
    labels = {NAME_LABEL: slice_name, RANK_LABEL: str(worker), TYPE_LABEL: kind, "ray.io/node-id": name}
    return {"Alive": alive, "NodeID": name, "NodeManagerAddress": f"10.0.0.{worker}", "Labels": labels}


def found(nodes: list[dict[str, Any]], hosts: int = 2) -> list[list[str]]:
    return [[spot.node_id for spot in spots] for spots in whole_slices(nodes, "v5p-16", hosts)]


def test_ranks_go_by_worker_id_as_a_number() -> None:
    nodes = [node("a", worker) for worker in (10, 9, 0, 2, 11, 1, 3, 8, 7, 4, 6, 5)]
    assert found(nodes, hosts=12) == [[f"a-{worker}" for worker in range(12)]]


def test_slices_go_by_name_whatever_order_ray_tells_them_in() -> None:
    assert found([node("b", 1), node("a", 1), node("b", 0), node("a", 0)]) == [["a-0", "a-1"], ["b-0", "b-1"]]


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [node("a", 0)],
        [node("a", 1), node("a", 2)],
        [node("a", 0), node("b", 1)],
        [node("a", 0), node("a", 1, alive=False)],
        [node("a", 0, kind="v5p-32"), node("a", 1, kind="v5p-32")],
        [{"Alive": True, "NodeID": "head", "NodeManagerAddress": "10.0.0.9", "Labels": {}}],
        [{"Alive": True, "NodeID": "head", "NodeManagerAddress": "10.0.0.9"}],
        [node("a", 0), node("a", 1), node("a", 2)],
    ],
)
def test_what_is_not_a_whole_living_slice_of_the_kind_is_passed_over(nodes: list[dict[str, Any]]) -> None:
    assert found([*nodes, node("z", 0), node("z", 1)]) == [["z-0", "z-1"]]


def test_a_node_that_came_back_under_its_old_name_replaces_the_dead_one() -> None:
    again = node("a", 1) | {"NodeID": "again"}
    assert found([node("a", 0), again, node("a", 1, alive=False)]) == [["a-0", "again"]]


def test_a_slice_with_a_chip_in_use_is_not_free() -> None:
    slices = whole_slices([node(name, worker) for name in "abc" for worker in (0, 1)], "v5p-16", 2)
    free = {"TPU": 4.0}
    available = {"a-0": free, "a-1": {"TPU": 3.0}, "b-0": free, "b-1": free, "c-0": free}  # of c-1 nothing is told
    assert [spots[0].slice_name for spots in free_slices(slices, available)] == ["b"]


def test_every_host_of_several_slices_learns_its_slice() -> None:
    spots = tuple(Spot(name, worker, f"{name}-{worker}", f"10.0.{name}") for name in "01" for worker in (0, 1))
    told = [multislice_env(Placement(spots, None), rank) for rank in range(4)]  # type: ignore[arg-type]
    assert [env["MEGASCALE_SLICE_ID"] for env in told] == ["0", "0", "1", "1"]
    assert {env["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0] for env in told} == {"10.0.0"}
    assert {env["MEGASCALE_NUM_SLICES"] for env in told} == {"2"}
