"""Finds whole slices among a Ray cluster's nodes by their labels, and reserves them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from orchestrator.config import Config
from orchestrator.interrupt import StoppedError
from orchestrator.topology import CHIPS_PER_HOST, NAME_LABEL, RANK_LABEL, TYPE_LABEL

POLL_S = 0.05
PLACE_S = 5.0  # what Ray may take to place hosts on nodes that look free, before others are tried


@dataclass(frozen=True)
class Spot:
    """One host of a slice."""

    slice_name: str
    worker_id: int
    node_id: str
    ip: str


@dataclass(frozen=True)
class Placement:
    """Hosts in rank order: slices by name, hosts of a slice by TPU worker id."""

    spots: tuple[Spot, ...]
    group: PlacementGroup


def whole_slices(nodes: Sequence[Mapping[str, Any]], slice_type: str, hosts: int) -> list[list[Spot]]:
    """The slices of a type whose every host is alive, by name; their hosts by worker id. Pure."""
    found: dict[str, dict[int, Spot]] = {}
    for node in nodes:
        labels = node.get("Labels", {})
        if node["Alive"] and labels.get(TYPE_LABEL) == slice_type and NAME_LABEL in labels and RANK_LABEL in labels:
            spot = Spot(labels[NAME_LABEL], int(labels[RANK_LABEL]), node["NodeID"], node["NodeManagerAddress"])
            found.setdefault(spot.slice_name, {})[spot.worker_id] = spot
    whole = [found[name] for name in sorted(found) if sorted(found[name]) == list(range(hosts))]
    return [[spots[worker] for worker in range(hosts)] for spots in whole]


def free_slices(slices: Sequence[list[Spot]], available: Mapping[str, Mapping[str, float]]) -> list[list[Spot]]:
    """Those whose every chip is free. available: resources by node id, as Ray tells them. Pure."""
    return [
        spots
        for spots in slices
        if all(available.get(spot.node_id, {}).get("TPU", 0.0) >= CHIPS_PER_HOST for spot in spots)
    ]


def reserve(config: Config, stop: Callable[[], bool]) -> Placement:
    """Waits for enough whole, free slices and takes them. Raises StoppedError, or TimeoutError saying what lacked."""
    wanted, hosts = config.cluster.num_slices, config.slice.hosts
    deadline = time.monotonic() + config.timeout.reserve_s
    while True:
        whole = whole_slices(ray.nodes(), config.cluster.slice, hosts)
        free = free_slices(whole, available_resources_per_node())
        if len(free) >= wanted:
            spots = tuple(spot for chosen in free[:wanted] for spot in chosen)
            bundle = {"TPU": float(CHIPS_PER_HOST), "CPU": 1.0}
            selectors = [{NAME_LABEL: spot.slice_name, RANK_LABEL: str(spot.worker_id)} for spot in spots]
            group = placement_group([bundle] * len(spots), "STRICT_SPREAD", bundle_label_selector=selectors)
            if group.wait(timeout_seconds=PLACE_S):
                return Placement(spots, group)
            remove_placement_group(group)
        if stop():
            raise StoppedError("slices")
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"no {config.cluster.slice} within timeout.reserve_s={config.timeout.reserve_s:.0f}:"
                f" {wanted} wanted, {len(whole)} whole ones of {hosts} hosts are there, {len(free)} of them free"
            )
        time.sleep(POLL_S)


def stands(placement: Placement) -> bool:
    """Whether every host of a placement is alive still."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return all(spot.node_id in alive for spot in placement.spots)


def release(placement: Placement) -> None:
    remove_placement_group(placement.group)
