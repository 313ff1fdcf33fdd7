"""What a run has on its hosts beyond one attempt: their places, the memory of snapshots, processes in reserve."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from gemma.reports import Opened
from orchestrator import group as hosts
from orchestrator import memory, placement, rundir
from orchestrator.config import Config
from orchestrator.group import Group
from orchestrator.memory import Attaching
from orchestrator.placement import Placement

PATIENCE_S = 1.0  # for memory that is there already: without it the first steps would have no snapshot


@dataclass
class Site:
    """Kept by the controller; actor handles are by node id."""

    space: str  # the keepers' namespace
    keepers: dict[str, Any] = field(default_factory=dict)
    spares: dict[str, Any] = field(default_factory=dict)  # processes with everything imported
    predecessors: dict[str, int] = field(default_factory=dict)  # the pid that was last at work on a node
    notices: dict[str, str] = field(default_factory=dict)  # of nodes about to be taken away
    ooms: dict[str, int] = field(default_factory=dict)  # processes killed for memory on a node so far
    keys: list[str] = field(default_factory=list)  # of each rank's share
    placement: Placement | None = None
    needed: bool = True  # the memory: not once all is on disk


def occupy(site: Site, config: Config, stop: Callable[[], bool]) -> Placement:
    """The hosts of the last attempt if all of them live, else others. Raises StoppedError, TimeoutError."""
    if site.placement is not None and not placement.stands(site.placement):
        placement.release(site.placement)
        site.placement = None
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        site.keepers = {node: keeper for node, keeper in site.keepers.items() if node in alive}
    if site.placement is None:
        site.placement = placement.reserve(config, stop)
    return site.placement


def take_spares(site: Site) -> dict[str, Any]:
    """They are at work from now on."""
    taken, site.spares = hosts.living(site.spares), {}
    return taken


def put_by(site: Site) -> None:
    """A process in reserve on every host."""
    assert site.placement is not None
    for spot in site.placement.spots:
        if spot.node_id not in site.spares:
            site.spares[spot.node_id] = hosts.spare(spot)


def equip(site: Site, config: Config, group: Group, opened: Sequence[Opened]) -> Attaching:
    """Asks for memory on every host, and for a keeper where there is none."""
    spots = group.placement.spots
    missing = [spot for spot in spots if spot.node_id not in site.keepers]
    for spot in missing:
        site.keepers[spot.node_id] = memory.make(site.space, spot, config.checkpoint.memory_idle_s)
    keepers = [site.keepers[spot.node_id] for spot in spots]
    keys = [one.share_key for one in opened]
    patience_s = 0.0 if missing else PATIENCE_S
    return memory.attach(keepers, keys, opened[0].share_bytes, group.pids, patience_s)


@contextmanager
def opened(config: Config, folder: Path) -> Iterator[Site]:
    """With what an earlier controller of this run left. At the end all is given back, but for snapshots that a
    controller which resumes the run will want.
    """
    site = Site(memory.namespace(folder.name, rundir.read_manifest(folder).created))
    if config.checkpoint.snapshot != "off":
        site.keepers = memory.find(site.space)
    try:
        yield site
    finally:
        hosts.stop(site.spares.values())
        if not site.needed:
            memory.end(site.keepers)
        if site.placement is not None:
            placement.release(site.placement)
