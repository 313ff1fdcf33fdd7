"""The hosts of one attempt as one thing: start them, send a verb to all, collect the answers, end them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config import Config
from orchestrator.hosts.placement import Placement, Spot
from orchestrator.hosts.worker import Hello, Host, Raised
from orchestrator.interrupt import StoppedError
from orchestrator.recovery.outcome import Evidence

POLL_S = 0.05
PING_S = 0.5  # for a spare process to answer; one still importing stays silent and counts as alive
MEGASCALE_PORT = 8080
GET_S = 10.0  # for an answer that is there to be read
GRACE_S = 3.0  # after a failure, for the death that explains it to be seen


@dataclass(frozen=True)
class Group:
    workers: tuple[Any, ...]  # Ray actor handles, in rank order
    placement: Placement
    begun: tuple[Any, ...]  # refs: each resolves once the process before it on that host is gone
    pids: tuple[int, ...] = ()
    coordinator: str = ""

    @property
    def by_node(self) -> dict[str, int]:
        """The process on each node."""
        return {spot.node_id: pid for spot, pid in zip(self.placement.spots, self.pids, strict=False)}


@dataclass(frozen=True)
class Call:
    """A verb that was sent to all hosts."""

    what: str
    refs: tuple[Any, ...]
    timeout_s: float  # counted from `collect`: hosts run calls in order; earlier calls' time is not counted
    placement: Placement


class HostsFailedError(Exception):
    """Some host died, raised or was overdue."""

    def __init__(self, evidence: Sequence[Evidence]):
        super().__init__(
            "; ".join(f"rank {e.rank}: {e.unfit or e.overdue or e.exception or 'died'} {e.message}" for e in evidence)
        )
        self.evidence = tuple(evidence)


def spare(spot: Spot) -> Any:
    """Starts a spare process on a host: it imports everything and waits. Returns at once."""
    actor = ray.remote(Host).options(
        num_cpus=0,  # the placement group holds the host's resources, for the working process and its successor
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(spot.node_id, soft=False),
    )
    return actor.remote()


def living(spares: Mapping[str, Any]) -> dict[str, Any]:
    """The spare processes that are still alive, by node id."""
    pings = {worker.ping.remote(): node for node, worker in spares.items()}
    ready, _ = ray.wait(list(pings), num_returns=len(pings), timeout=PING_S) if pings else ([], [])
    dead = {pings[ref] for ref in ready if isinstance(answer(ref), RayActorError)}
    return {node: worker for node, worker in spares.items() if node not in dead}


def spawn(
    config: Config,
    placement: Placement,
    folder: Path,
    attempt: int,
    predecessors: Mapping[str, int],
    spares: Mapping[str, Any],
) -> Group:
    """A process on every host, a spare one where there is one; returns at once.

    predecessors: the pid that ran on a node before, by node id.
    """
    workers, begun = [], []
    for rank, spot in enumerate(placement.spots):
        worker = spares.get(spot.node_id) or spare(spot)
        log = folder / "logs" / f"attempt-{attempt}-host-{rank}.log"
        gone = [predecessors[spot.node_id]] if spot.node_id in predecessors else []
        env = multislice_env(placement, rank) if config.cluster.num_slices > 1 else {}
        workers.append(worker)
        begun.append(worker.begin.remote(str(log), env, gone, config.timeout.stop_s))
    return Group(tuple(workers), placement, tuple(begun))


def multislice_env(placement: Placement, rank: int) -> dict[str, str]:
    """What libtpu must know to reach the other slices over the data-center network."""
    names = list(dict.fromkeys(spot.slice_name for spot in placement.spots))
    return {
        "MEGASCALE_COORDINATOR_ADDRESS": f"{placement.spots[0].ip}:{MEGASCALE_PORT}",
        "MEGASCALE_NUM_SLICES": str(len(names)),
        "MEGASCALE_SLICE_ID": str(names.index(placement.spots[rank].slice_name)),
    }


def join(group: Group, config: Config, stop: Callable[[], bool]) -> Group:
    """Waits for the processes and lets them find each other. Raises HostsFailedError, StoppedError."""
    timeout_s = config.timeout.start_s
    spots = group.placement.spots
    collect(Call("process start", group.begun, timeout_s, group.placement), stop)
    refs = [w.hello.remote(spot.ip) for w, spot in zip(group.workers, spots, strict=True)]
    hellos: list[Hello] = collect(Call("process start", tuple(refs), timeout_s, group.placement), stop)
    group = replace(group, pids=tuple(h.pid for h in hellos), coordinator=hellos[0].coordinator)
    if len(spots) > 1:
        refs = [w.join.remote(rank, len(spots), group.coordinator, timeout_s) for rank, w in enumerate(group.workers)]
        collect(Call("distributed init", tuple(refs), timeout_s, group.placement), stop)
    return group


def tokenise(group: Group, config: Config) -> Call:
    """Has every host make the text ready. Hosts wait for one another for less time than the call may take."""
    timeout_s = config.timeout.tokenize_s
    refs = [w.tokenise.remote(config.program, config.run.cache, 0.9 * timeout_s) for w in group.workers]
    return Call("tokenising (timeout.tokenize_s)", tuple(refs), timeout_s, group.placement)


def open_programs(group: Group, config: Config, folder: Path) -> Call:
    """Has every host open the program that the config names, and compile what it needs."""
    refs = [w.open.remote(config.program, str(folder), config.run.cache) for w in group.workers]
    return Call("compile", tuple(refs), config.timeout.compile_s, group.placement)


def call(group: Group, timeout_s: float, verb: str, *args: Any) -> Call:
    """Sends a verb to all hosts, which work verbs off in the order sent."""
    return call_each(group, timeout_s, verb, [args] * len(group.workers))


def call_each(group: Group, timeout_s: float, verb: str, arguments: Sequence[tuple[Any, ...]]) -> Call:
    """The same, with each host's own arguments, in rank order."""
    refs = tuple(w.call.remote(verb, *args) for w, args in zip(group.workers, arguments, strict=True))
    return Call(verb, refs, timeout_s, group.placement)


def collect(sent: Call, stop: Callable[[], bool] = lambda: False) -> list[Any]:
    """Waits for every host's answer; in rank order. Raises HostsFailedError, and StoppedError once `stop()`."""
    waiting = list(sent.refs)
    found: dict[Any, Any] = {}
    deadline = time.monotonic() + sent.timeout_s
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        found |= answers(ready)
        if any(not isinstance(found[ref], Answer) for ref in ready):
            raise HostsFailedError(gather_evidence(sent))
        if waiting and stop():
            raise StoppedError(sent.what)
        if waiting and time.monotonic() > deadline:
            late = set(waiting)
            overdue = [Evidence(rank, overdue=sent.what) for rank, ref in enumerate(sent.refs) if ref in late]
            raise HostsFailedError(overdue)
    return [found[ref].value for ref in sent.refs]


@dataclass(frozen=True)
class Answer:
    value: Any


def answers(refs: Sequence[Any]) -> dict[Any, Any]:
    """Reads refs that are ready, in one call where none has failed: there may be thousands."""
    try:
        values = ray.get(list(refs), timeout=GET_S)
    except RayError:
        return {ref: answer(ref) for ref in refs}
    return {ref: v if isinstance(v, Raised) else Answer(v) for ref, v in zip(refs, values, strict=True)}


def answer(ref: Any) -> Any:
    """An Answer, a Raised, or the error Ray gives for a dead process."""
    try:
        value = ray.get(ref, timeout=GET_S)
    except RayError as error:
        return error
    return value if isinstance(value, Raised) else Answer(value)


def gather_evidence(sent: Call) -> list[Evidence]:
    """What each failed host reports, after a short wait: a death often shows later than the exceptions it causes."""
    deadline = time.monotonic() + GRACE_S
    while True:
        ready, waiting = ray.wait(list(sent.refs), num_returns=len(sent.refs), timeout=POLL_S)
        there = answers(ready)
        failed = {rank: there[ref] for rank, ref in enumerate(sent.refs) if ref in there}
        failed = {rank: found for rank, found in failed.items() if not isinstance(found, Answer)}
        died = any(isinstance(found, RayError) for found in failed.values())
        if died or not waiting or time.monotonic() > deadline:
            break
    return [describe(rank, found) for rank, found in failed.items()]


def describe(rank: int, found: Raised | RayError) -> Evidence:
    if isinstance(found, Raised):
        raised = found.exception, found.message, found.traceback
        return Evidence(rank, exception=raised[0], message=raised[1], traceback=raised[2], time=found.time)
    starved = isinstance(found, OutOfMemoryError)  # killed by Ray, before the kernel does
    return Evidence(rank, died=True, out_of_memory=starved, message=" ".join(str(found).split()))


def stop(workers: Iterable[Any]) -> None:
    """Kills processes. The next attempt waits until their pids are gone."""
    for worker in workers:
        ray.kill(worker, no_restart=True)
