"""A cloud of this machine's own: simulated slices are asked for, waited for, lost and given back as real ones are."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.config import Config
from orchestrator.slices import existing
from orchestrator.slices.cluster import Local
from orchestrator.slices.simulated import simulated
from orchestrator.slices.simulated.raylet import Host
from orchestrator.slices.topology import Slice
from orchestrator.slices.upkeep import Provider, RefusedError, Upkeep
from orchestrator.slices.wanted import Create, Request, State, Wanted

HERE = "here"  # its one zone
POLL_S = 0.2
ASK_AGAIN_S = 2.0  # where there was no capacity
REJOIN_S = 30.0
CALL_TIMEOUT_S = 5.0
PREEMPTED = "preempted"
REASON = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto


@dataclass
class Made:
    """A slice, from being asked for to being gone."""

    since: float  # time.time()
    hosts: dict[int, Host]  # by index among the nodes
    up_at: float | None = None  # its hosts were started
    told_at: float | None = None  # its hosts were told that they will be taken away
    state: State = State.WAITING


@dataclass
class Cloud:
    kind: Slice
    settings: Local
    repair_s: float | None
    cluster: simulated.Cluster
    owner: str
    opened_at: float  # time.time()
    made: dict[str, Made] = field(default_factory=dict)
    preempted: bool = False


def upkeep(config: Config, cluster: simulated.Cluster) -> Upkeep:
    settings, kind, owner = config.cluster.local, config.slice, str(config.run.id)
    assert settings is not None
    cloud = Cloud(kind, settings, config.cluster.repair_s, cluster, owner, time.time())
    provider = Provider(
        partial(list_requests, cloud),
        partial(create, cloud),
        partial(delete, cloud),
        partial(existing.joined, config),
        "local",
    )
    wanted = Wanted(owner, kind.name, kind.topology, config.cluster.num_slices, (HERE,), ASK_AGAIN_S)
    return Upkeep(wanted, provider, POLL_S, REJOIN_S)


def create(cloud: Cloud, asked: Create) -> None:
    left_s = cloud.opened_at + cloud.settings.stock_out_s - time.time()
    if left_s > 0:
        raise RefusedError("stock-out", f"no {cloud.kind.name} for {left_s:.0f} s more, says cluster.local.stock_out_s")
    taken = {index for made in cloud.made.values() for index in made.hosts}
    free = (index for index in range(len(taken) + cloud.kind.hosts) if index not in taken)
    hosts = zip(free, simulated.slice_hosts(cloud.kind, asked.name), strict=False)
    cloud.made[asked.name] = Made(time.time(), dict(hosts))


def list_requests(cloud: Cloud) -> Sequence[Request]:
    """Moves each slice to where it would be by now."""
    now = time.time()
    for made in cloud.made.values():
        move(cloud, made, now)
    return [
        Request(name, HERE, cloud.owner, made.state, cloud.kind.name, cloud.kind.topology, made.since, why(made))
        for name, made in cloud.made.items()
    ]


def why(made: Made) -> str:
    return PREEMPTED if made.state is State.LOST else ""


def move(cloud: Cloud, made: Made, now: float) -> None:
    settings, nodes = cloud.settings, cloud.cluster.nodes
    if made.state is State.WAITING and now - made.since >= settings.provision_s:
        for index, host in made.hosts.items():
            simulated.start_node(cloud.cluster, index, host)
        made.state, made.up_at = State.READY, now
    if made.state is not State.READY:
        return
    assert made.up_at is not None
    if made.told_at is None and is_due(cloud, made, now):
        cloud.preempted, made.told_at = True, now
        drain(cloud, [nodes[index].node_id for index in made.hosts], now + settings.notice_s)
    if made.told_at is None:
        simulated.repair(cloud.cluster, made.hosts, cloud.repair_s)
    elif now - made.told_at >= settings.notice_s:
        simulated.end_nodes(cloud.cluster, made.hosts)
        made.state = State.LOST


def is_due(cloud: Cloud, made: Made, now: float) -> bool:
    """Whether this slice is to be taken away: the first that stands, once."""
    after_s, up_at = cloud.settings.preempt_s, made.up_at or now
    first = min(one.up_at or now for one in cloud.made.values())
    return after_s is not None and not cloud.preempted and up_at == first and now - up_at >= after_s


def drain(cloud: Cloud, nodes: Sequence[str], deadline: float) -> None:
    """Tells Ray, as the autoscaler of a cloud would, that nodes will be taken away."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client: Any = GcsClient(address=cloud.cluster.address)
    for node in nodes:
        client.drain_node(node, REASON, PREEMPTED, int(deadline * 1000))


def delete(cloud: Cloud, request: Request) -> None:
    if (made := cloud.made.pop(request.name, None)) is not None:
        simulated.end_nodes(cloud.cluster, made.hosts)
