"""What a run keeps on its hosts across attempts: their placement, keepers of snapshots, spare processes."""

import signal
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray

from gemma.config import ConfigError
from gemma.messages import Opened
from orchestrator.config import Config, with_slices
from orchestrator.hosts import group as hosts
from orchestrator.hosts import memory, placement
from orchestrator.hosts.group import Group
from orchestrator.hosts.keeper import Held
from orchestrator.hosts.memory import Attaching
from orchestrator.hosts.placement import Placement, Spot
from orchestrator.interrupt import StoppedError
from orchestrator.record import rundir
from orchestrator.recovery.outcome import Evidence
from orchestrator.slices import metadata
from orchestrator.slices.lease import Lease
from orchestrator.slices.upkeep import NoSlicesError

BACK = "a lost slice is back"
SAY_EVERY_S = 60.0
PATIENCE_S = 3.0  # for snapshot memory after a failure, so that a second failure soon after finds a snapshot


@dataclass(frozen=True)
class Quarantined:
    """A host that this run no longer uses."""

    spot: Spot
    why: str

    def __str__(self) -> str:
        return f"host {self.spot.ip} (worker {self.spot.worker_id} of {self.spot.slice_name}): {self.why}"


@dataclass
class Fleet:
    """Held by the controller; dicts are by node id."""

    config: Config  # of the whole run: with all slices that the user asked for
    space: str  # the keepers' namespace
    lease: Lease
    keepers: dict[str, Any] = field(default_factory=dict)
    spares: dict[str, Any] = field(default_factory=dict)  # processes with everything imported
    predecessors: dict[str, int] = field(default_factory=dict)  # the pid that last worked on a node
    notices: dict[str, str] = field(default_factory=dict)  # nodes about to be taken away, and who said so
    ooms: dict[str, int] = field(default_factory=dict)  # processes killed for memory on a node so far
    keys: list[str] = field(default_factory=list)  # of each rank's share
    fit: set[str] = field(default_factory=set)  # nodes whose chips were found sound
    quarantined: dict[str, Quarantined] = field(default_factory=dict)  # by node id: an address may be another host's
    placement: Placement | None = None
    occupied: bool = False  # the run has had its slices before
    needed: bool = True  # snapshots in memory: false once everything is on disk

    @property
    def avoid(self) -> Mapping[str, Any]:
        """Nodes that will go or are bad: a live view."""
        return ChainMap(self.notices, self.quarantined)


def reserve_hosts(fleet: Fleet, stop: Callable[[], bool], tell: Callable[[str], None]) -> Placement:
    """The hosts of the last attempt if all of them stay, else others: as many slices as the user asked for or, when a
    lost one is not replaced in time, fewer. Raises StoppedError, TimeoutError.
    """
    if fleet.placement is not None and not placement.stands(fleet.placement, fleet.avoid):
        placement.release(fleet.placement)
        fleet.placement = None
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        fleet.keepers = {node: keeper for node, keeper in fleet.keepers.items() if node in alive}
    if fleet.placement is None:
        config = fleet.config
        bad = "".join(f"; quarantined: {one}" for one in fleet.quarantined.values())
        said = time.monotonic()
        for one in fleet.quarantined.values():
            fleet.lease.discard(one.spot, one.why)

        def wait() -> None:
            nonlocal said
            if stop():
                raise StoppedError("slices")
            fleet.lease.repair()
            if fleet.notices:
                note_departures(fleet, memory.inventory(fleet.keepers))
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                tell(f"waiting for {config.cluster.num_slices} x {config.cluster.slice}{bad}")

        enough = partial(acceptable_counts, config, fleet.occupied)
        try:
            fleet.placement = placement.reserve(config, enough, fleet.avoid, wait, fleet.lease.owns)
        except TimeoutError as late:
            raise TimeoutError(f"{late}{bad}") from late
        fleet.occupied = True
    return fleet.placement


def note_departures(fleet: Fleet, held: Mapping[str, Held]) -> None:
    """Updates which hosts are about to be taken away. Only a host that answers can take a warning back: Ray reports a
    host as alive for some seconds after it is gone.
    """
    now = {node: said for node, said in fleet.notices.items() if node not in held}
    now |= {node: one.notice for node, one in held.items() if one.notice}
    fleet.notices.clear()  # in place: `avoid` is a live view of it
    fleet.notices |= now


def quarantined(folder: Path) -> dict[str, Quarantined]:
    """Hosts that this run has found bad, under earlier controllers too, by node id."""
    told = [event for event in rundir.events(folder) if event["event"] == "unfit"]
    return {e["node"]: Quarantined(Spot(e["slice"], e["worker"], e["node"], e["host"]), e["why"]) for e in told}


def acceptable_counts(config: Config, again: bool, waited_s: float) -> list[int]:
    """Which numbers of slices are acceptable after waiting for so long; none once it is too late. Pure.

    again: the run has had its slices before.
    """
    wanted, timeout = config.cluster.num_slices, config.timeout
    if not again:
        return [wanted] if waited_s <= timeout.reserve_s else []
    if waited_s > timeout.replace_s:
        return []
    least = config.cluster.min_slices or wanted
    return [wanted] if waited_s < timeout.shrink_s else [n for n in range(least, wanted + 1) if can_shrink(config, n)]


def can_shrink(config: Config, count: int) -> bool:
    try:
        with_slices(config, count)
    except ConfigError:
        return False
    return True


def reason_to_leave(fleet: Fleet) -> Evidence | None:
    """Why the run should move on at the next step boundary: a host is drained, or a lost slice is back."""
    assert fleet.placement is not None
    fleet.lease.check_head()
    fleet.lease.news()
    wanted = fleet.config.cluster.num_slices
    going = placement.draining()
    for rank, spot in enumerate(fleet.placement.spots):
        if spot.node_id in going:
            return Evidence(rank, notice=f"host {spot.ip} is being drained", time=time.time())
    if fleet.placement.slices < wanted:
        with suppress(NoSlicesError):  # the run has enough to go on with; said again where it has to wait
            fleet.lease.repair()
        _, free = placement.usable_slices(fleet.config, fleet.avoid, fleet.lease.owns)
        if len(free) + fleet.placement.slices >= wanted:
            return Evidence(0, notice=BACK, time=time.time())
    return None


def take_spares(fleet: Fleet) -> dict[str, Any]:
    """Hands out the living spare processes; the fleet has none afterwards."""
    taken, fleet.spares = hosts.living(fleet.spares), {}
    return taken


def start_keepers(fleet: Fleet, group: Group) -> None:
    """Starts a keeper on every host that has none. It notes when the host's process ends."""
    for spot, (node, pid) in zip(group.placement.spots, group.by_node.items(), strict=True):
        if node not in fleet.keepers:
            asked = metadata.HOST if fleet.config.cluster.kind != "local" else None
            fleet.keepers[node] = memory.make(fleet.space, spot, fleet.config.checkpoint.memory_idle_s, asked)
        fleet.keepers[node].watch.remote(pid)


def kill(fleet: Fleet, group: Group) -> None:
    """Ends the processes of an attempt: through their keepers, which reach even a stopped process, and through Ray."""
    fleet.predecessors |= group.by_node
    if not has_head(fleet):
        return  # the provider ends all processes: Ray's calls would wait in vain
    for node, pid in group.by_node.items():
        if node in fleet.keepers:
            fleet.keepers[node].signal.remote(pid, signal.SIGKILL)
    hosts.stop(group.workers)


def start_spares(fleet: Fleet) -> None:
    """Starts a spare process on every host that has none."""
    assert fleet.placement is not None
    for spot in fleet.placement.spots:
        if spot.node_id not in fleet.spares:
            fleet.spares[spot.node_id] = hosts.spare(spot)


def request_memory(fleet: Fleet, group: Group, opened: Sequence[Opened], patience_s: float) -> Attaching:
    """Asks every host's keeper for memory that holds its share of a snapshot."""
    keepers = [fleet.keepers[spot.node_id] for spot in group.placement.spots]
    keys = [one.share_key for one in opened]
    return memory.attach(keepers, keys, opened[0].share_bytes, patience_s)


@contextmanager
def managed(config: Config, folder: Path, lease: Lease, name: str | None = None) -> Iterator[Fleet]:
    """A fleet that takes over what an earlier controller of this run left. At the end everything is given back, except
    snapshots that a controller which resumes the run will want.

    name: of the run, where the folder's alone does not tell it from others.
    """
    fleet = Fleet(config, memory.namespace(name or folder.name, rundir.read_manifest(folder).created), lease)
    fleet.keepers = memory.find(fleet.space)
    fleet.quarantined = quarantined(folder) if config.fitness.check else {}  # false lifts it
    try:
        yield fleet
    finally:
        if has_head(fleet):
            hosts.stop(fleet.spares.values())
            if not fleet.needed:
                memory.end(fleet.keepers)
            if fleet.placement is not None:
                placement.release(fleet.placement)


def has_head(fleet: Fleet) -> bool:
    """Whether the Ray cluster still has its head, as far as the provider knows."""
    try:
        fleet.lease.check_head()
    except NoSlicesError:
        return False
    return True
