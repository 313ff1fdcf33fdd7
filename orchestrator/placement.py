"""Finds whole slices among a Ray cluster's nodes by their labels, and reserves them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from orchestrator.config import Config
from orchestrator.topology import CHIPS_PER_HOST

NAME, RANK, TYPE = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id", "ray.io/tpu-pod-type"


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
        if node["Alive"] and labels.get(TYPE) == slice_type and NAME in labels and RANK in labels:
            spot = Spot(labels[NAME], int(labels[RANK]), node["NodeID"], node["NodeManagerAddress"])
            found.setdefault(spot.slice_name, {})[spot.worker_id] = spot
    whole = [found[name] for name in sorted(found) if sorted(found[name]) == list(range(hosts))]
    return [[spots[worker] for worker in range(hosts)] for spots in whole]


def reserve(config: Config) -> Placement:
    """Waits for enough whole slices and takes them. Raises TimeoutError saying what was missing."""
    wanted, hosts = config.cluster.num_slices, config.slice.hosts
    deadline = time.monotonic() + config.timeout.reserve_s
    while True:
        slices = whole_slices(ray.nodes(), config.cluster.slice, hosts)
        if len(slices) >= wanted:
            spots = tuple(spot for chosen in slices[:wanted] for spot in chosen)
            bundle = {"TPU": float(CHIPS_PER_HOST), "CPU": 1.0}
            selectors = [{NAME: spot.slice_name, RANK: str(spot.worker_id)} for spot in spots]
            group = placement_group([bundle] * len(spots), "STRICT_SPREAD", bundle_label_selector=selectors)
            if group.wait(timeout_seconds=max(1.0, deadline - time.monotonic())):
                return Placement(spots, group)
            remove_placement_group(group)
            why = f"{len(slices)} whole slices are there, but in use"
        else:
            why = f"{len(slices)} of {wanted} whole slices of {hosts} hosts are there"
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"no {config.cluster.slice} within timeout.reserve_s={config.timeout.reserve_s:.0f}: {why}"
            )
        time.sleep(0.05)


def release(placement: Placement) -> None:
    remove_placement_group(placement.group)
