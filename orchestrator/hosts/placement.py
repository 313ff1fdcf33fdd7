"""Finds whole slices among a Ray cluster's nodes by their labels, and reserves them."""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from orchestrator.config import Config
from orchestrator.slices.topology import CHIPS_PER_HOST, NAME_LABEL, RANK_LABEL, TYPE_LABEL

POLL_S = 0.05
CHOOSING = threading.Lock()  # a replica of a server chooses at a time
TAKEN: set[str] = set()  # slices that this process holds: Ray tells of it a moment later
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

    @property
    def slices(self) -> int:
        return len({spot.slice_name for spot in self.spots})


def whole_slices(
    nodes: Sequence[Mapping[str, Any]], slice_type: str, hosts: int, avoid: Collection[str] = ()
) -> list[list[Spot]]:
    """The slices of a type whose every host is alive, by name; their hosts by worker id. Pure.

    avoid: nodes that are about to be taken away.
    """
    found: dict[str, dict[int, Spot]] = {}
    for node in nodes:
        labels = node.get("Labels", {})
        usable = node["Alive"] and node["NodeID"] not in avoid
        if usable and labels.get(TYPE_LABEL) == slice_type and NAME_LABEL in labels and RANK_LABEL in labels:
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


def usable_slices(config: Config, avoid: Collection[str], owns: Callable[[str], bool]) -> tuple[int, list[list[Spot]]]:
    """How many whole slices there are that are the run's to use, and those of them that are free now."""
    leaving = {*avoid, *draining()}
    there = whole_slices(ray.nodes(), config.cluster.slice, config.slice.hosts, leaving)
    whole = [spots for spots in there if owns(spots[0].slice_name)]
    return len(whole), free_slices(whole, available_resources_per_node())


def reserve(
    config: Config,
    enough: Callable[[float], Collection[int]],
    avoid: Collection[str],
    wait: Callable[[], None],
    owns: Callable[[str], bool] = lambda name: True,
) -> Placement:
    """Waits for whole, free slices and takes them. Raises TimeoutError saying what lacked.

    enough: the numbers of slices that will do after so many seconds, none once it is too late. wait: called again and
    again meanwhile; it may raise.
    """
    started = time.monotonic()
    while True:
        waited_s = time.monotonic() - started
        with CHOOSING:
            whole, free = usable_slices(config, avoid, owns)
            free = [spots for spots in free if spots[0].slice_name not in TAKEN]
            fitting = [count for count in enough(waited_s) if count <= len(free)]
            if fitting and (group := placed(free[: max(fitting)])):
                chosen = Placement(tuple(spot for spots in free[: max(fitting)] for spot in spots), group)
                TAKEN.update(spot.slice_name for spot in chosen.spots)
                return chosen
        wait()
        if not enough(waited_s):
            raise TimeoutError(
                f"no {config.cluster.slice} within {waited_s:.0f} s: {config.cluster.num_slices} wanted,"
                f" {whole} whole ones of {config.slice.hosts} hosts are there, {len(free)} of them free"
            )
        time.sleep(POLL_S)


def placed(slices: Sequence[list[Spot]]) -> PlacementGroup | None:
    """Takes every host of these slices; None where Ray does not give them at once."""
    spots = [spot for chosen in slices for spot in chosen]
    bundle = {"TPU": float(CHIPS_PER_HOST), "CPU": 1.0}
    selectors = [{NAME_LABEL: spot.slice_name, RANK_LABEL: str(spot.worker_id)} for spot in spots]
    group = placement_group([bundle] * len(spots), "STRICT_SPREAD", bundle_label_selector=selectors)
    if group.wait(timeout_seconds=PLACE_S):
        return group
    remove_placement_group(group)
    return None


def draining() -> set[str]:
    """Nodes of which Ray was told that they will be taken away."""
    return set(state.get_draining_nodes())


def stands(placement: Placement, avoid: Collection[str]) -> bool:
    """Whether every host of a placement is alive still, and will be."""
    usable = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {*avoid, *draining()}
    return all(spot.node_id in usable for spot in placement.spots)


def release(placement: Placement) -> None:
    TAKEN.difference_update(spot.slice_name for spot in placement.spots)
    remove_placement_group(placement.group)
