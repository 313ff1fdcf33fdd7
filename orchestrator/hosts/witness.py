"""Collects the evidence of a failure from the hosts' answers, their keepers, Ray and the files they left."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import Group
from orchestrator.hosts.keeper import Held
from orchestrator.recovery.outcome import Evidence

MARKED_S = 8.0  # for Ray to mark a machine dead after its keeper died
STACKS_S = 2.0  # for a process to write its stacks
DRAINED = 3  # AUTOSCALER_DRAIN_PREEMPTED of Ray's gcs.proto: the node's removal was announced


def investigate(
    evidence: Sequence[Evidence], group: Group, fleet: Fleet, held: Mapping[str, Held], folder: Path, attempt: int
) -> list[Evidence]:
    """The failed hosts with everything known about them, and the hosts whose machine is gone: a peer that aborted
    because of the loss may be seen first. held: the answers of the keepers that answered.
    """
    spots = group.placement.spots
    silent = {spot.node_id for spot in spots} & fleet.keepers.keys() - held.keys()
    alive = wait_marked(set() if all(item.unfit for item in evidence) else silent)  # then keepers are still coming up
    drained = {node["NodeID"]: "its node was drained" for node in ray.nodes() if node.get("DeathReason") == DRAINED}
    told_of = {item.rank for item in evidence}
    gone = [rank for rank, spot in enumerate(spots) if spot.node_id not in alive and rank not in told_of]
    evidence = [*evidence, *(Evidence(rank, died=True, message="its machine is gone") for rank in gone)]
    slices = {spot.slice_name for spot in spots if spot.node_id in alive}
    found = []
    for item in evidence:
        spot = spots[item.rank]
        told = held.get(spot.node_id)
        pid = group.pids[item.rank] if group.pids else 0
        found.append(
            replace(
                item,
                node_alive=spot.node_id in alive,
                slice_alive=spot.slice_name in slices,
                notice=item.notice
                or (told.notice if told else None)
                or fleet.notices.get(spot.node_id)
                or drained.get(spot.node_id),
                crash=crash_of(folder, attempt, item.rank) if item.died else "",
                out_of_memory=item.out_of_memory or item.died and killed_for_memory(fleet.ooms, spot.node_id, told),
                time=item.time or (told.deaths.get(pid, 0.0) if told else 0.0),
            )
        )
    fleet.ooms |= {node: told.ooms for node, told in held.items()}
    return found


def wait_marked(silent: set[str]) -> set[str]:
    """The living nodes, after giving Ray time to mark those dead whose keepers are silent."""
    deadline = time.monotonic() + (MARKED_S if silent else 0.0)
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not silent & alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def killed_for_memory(before: Mapping[str, int], node: str, told: Held | None) -> bool:
    return told is not None and node in before and told.ooms > before[node]


def crash_of(folder: Path, attempt: int, rank: int) -> str:
    """What a process wrote as it crashed; empty where it was killed."""
    path = folder / "logs" / f"attempt-{attempt}-host-{rank}.log.crash"
    try:
        return path.read_text(errors="replace")[:4000]
    except OSError:
        return ""


def dump_stacks(group: Group, fleet: Fleet, folder: Path, attempt: int) -> dict[int, str]:
    """Makes every host write its stacks into the run directory; returns what the kernel says of each, by rank."""
    refs = {}
    for rank, (spot, pid) in enumerate(zip(group.placement.spots, group.pids, strict=False)):
        if spot.node_id in fleet.keepers:
            refs[fleet.keepers[spot.node_id].stacks.remote(pid)] = rank
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=STACKS_S) if refs else ([], [])
    found = {}
    for ref in ready:
        try:
            found[refs[ref]] = ray.get(ref)
        except ray.exceptions.RayError:
            continue
    wait_written([folder / "logs" / f"attempt-{attempt}-host-{rank}.log.stacks" for rank in found])
    return found


def wait_written(files: Sequence[Path]) -> None:
    """Waits at most STACKS_S: a stopped process writes nothing."""
    deadline = time.monotonic() + STACKS_S
    while time.monotonic() < deadline and any(not path.exists() or not path.stat().st_size for path in files):
        time.sleep(0.05)


def is_stopped(kernel: str) -> bool:
    """Whether the kernel says that all threads of a process are stopped (T), as by SIGSTOP."""
    states = {line.split()[0] for line in kernel.splitlines()}
    return bool(states) and states <= {"T", "t"}
