"""The memory of all hosts together: a keeper on each, the snapshots they hold, and the newest step in all of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gemma.memory.wire import Address
from orchestrator.hosts.keeper import Held, Keeper
from orchestrator.hosts.placement import Spot

ASK_S = 1.0  # for keepers to answer; those of a dead machine never will
THREADS = 4  # of a keeper, for calls of the controller; it receives snapshots in threads of its own


@dataclass(frozen=True)
class CommonStep:
    """A step of which every share of the state is in some host's memory."""

    step: int
    attempt: int  # that made it
    nodes: tuple[str, ...]  # whose memory each rank reads, in rank order


def namespace(run_id: str, created: float) -> str:
    """Of one run's keepers, in a Ray cluster that other runs use too."""
    return f"gemma-{run_id}-{created:.0f}"


def find(space: str) -> dict[str, Any]:
    """The living keepers of this run, by node id: those of an earlier controller, where the cluster lived on."""
    found = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == space]
    return {actor["name"]: ray.get_actor(actor["name"], space) for actor in found}


def make(space: str, spot: Spot, idle_s: float, metadata_host: str | None) -> Any:
    """Starts a keeper on a host; returns its handle at once. metadata_host: used where the environment names none."""
    actor = ray.remote(Keeper).options(
        name=spot.node_id,
        namespace=space,
        lifetime="detached",
        num_cpus=0,
        max_restarts=0,
        max_concurrency=THREADS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(spot.node_id, soft=False),
    )
    return actor.remote(spot.ip, idle_s, metadata_host)


def inventory(keepers: Mapping[str, Any]) -> dict[str, Held]:
    """What each keeper that answers holds, by node id."""
    refs = {keeper.inventory.remote(): node for node, keeper in keepers.items()}
    if not refs:
        return {}
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=ASK_S)
    found = {}
    for ref in ready:
        try:
            found[refs[ref]] = ray.get(ref)
        except RayError:  # it died with its host
            continue
    return found


def newest_common(
    keys: Sequence[str], nodes: Sequence[str], held: Mapping[str, Held], branches: Mapping[int, int], limit: int = 2**62
) -> CommonStep | None:
    """The newest step up to `limit` of which every rank's share lies in some memory. Pure.

    Each rank reads its own host's memory where that has it.

    keys, nodes: of each rank. branches: for an attempt, the step up to which later ones have kept its history.
    """
    where: dict[str, dict[tuple[int, int], list[str]]] = {key: {} for key in keys}
    for node, memory in held.items():
        for key in memory.steps.keys() & where.keys():
            for at in memory.steps[key]:
                where[key].setdefault(at, []).append(node)
    common = set.intersection(*(set(there) for there in where.values())) if where else set()
    valid = [(step, attempt) for step, attempt in common if step <= min(limit, branches.get(attempt, step))]
    if not valid:
        return None
    best = max(valid)
    there = {key: set(found[best]) for key, found in where.items()}
    own = [node if node in there[key] else where[key][best][0] for key, node in zip(keys, nodes, strict=True)]
    return CommonStep(*best, tuple(own))


def branches(events: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """For each attempt, the lowest step a later attempt resumed from: its steps beyond that are invalid. Pure."""
    began = {e["attempt"]: e["step"] for e in events if e["event"] in ("restore", "initialise")}
    return {attempt: min([step for a, step in began.items() if a > attempt], default=2**62) for attempt in began}


def buddies(keys: Sequence[str], slices: Sequence[str]) -> list[int | None]:
    """The rank whose memory keeps a copy of each rank's share: in another slice where there are several. Pure.

    None where a host of another replica holds the same bytes anyway, or where there is no other host.
    """
    count, holders = len(keys), Counter(keys)
    shift = count // len(set(slices)) if len(set(slices)) > 1 else 1  # the same place in the next slice; its neighbour
    return [None if holders[key] > 1 or count == 1 else (rank + shift) % count for rank, key in enumerate(keys)]


@dataclass
class Attaching:
    """Memory for every share, requested from the keepers and not yet there."""

    addresses: list[Any]  # refs of Held
    paths: list[Any]  # refs of str
    patience_s: float  # that the first call of `ready` waits

    def ready(self) -> bool:
        refs = [*self.addresses, *self.paths]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=self.patience_s)
        self.patience_s = 0.0
        return len(done) == len(refs)


def keep_arguments(
    attaching: Attaching, keys: Sequence[str], slices: Sequence[str], attempt: int
) -> list[tuple[Any, ...]]:
    """The arguments of the verb `keep`, for each rank. Raises RayError where a keeper has died or has no room."""
    addresses: list[Address] = [held.address for held in ray.get(attaching.addresses)]
    return [
        (path, None if buddy is None else addresses[buddy], attempt)
        for path, buddy in zip(ray.get(attaching.paths), buddies(keys, slices), strict=True)
    ]


def attach(keepers: Sequence[Any], keys: Sequence[str], share_bytes: int, patience_s: float) -> Attaching:
    """Requests memory from every keeper, in rank order."""
    paths = [keeper.hold.remote(key, share_bytes) for keeper, key in zip(keepers, keys, strict=True)]
    return Attaching([keeper.inventory.remote() for keeper in keepers], paths, patience_s)


def end(keepers: Mapping[str, Any]) -> None:
    """Their memory goes with them."""
    for keeper in keepers.values():
        ray.kill(keeper, no_restart=True)
