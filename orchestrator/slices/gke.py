"""cluster=gke as a run, or launch.cluster, has it: a RayCluster that KubeRay keeps, joined once its head is up."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.interrupt import StoppedError
from orchestrator.slices import existing, guest, kube
from orchestrator.slices.cluster import Cluster, Gke
from orchestrator.slices.head import listens
from orchestrator.slices.lease import Lease
from orchestrator.slices.raycluster import raycluster
from orchestrator.slices.topology import slice_type
from orchestrator.slices.upkeep import Provider, RefusedError, Upkeep, managed
from orchestrator.slices.wanted import Create, Wanted, owner_label

if TYPE_CHECKING:
    from orchestrator.hosts.placement import Spot

FOREVER_S = float("inf")  # there is no other place to ask
REACH_S = 30.0  # for a head that is ready to answer here
SAY_EVERY_S = 60.0


def open_provider(
    config: Config, owner: str, joined: Callable[[], set[str]] = set, alive: Callable[[str], bool] = lambda _: True
) -> Provider:
    """What an owner may ask of it. Raises ConfigError where there are no credentials.

    joined: is not looked at, as KubeRay replaces hosts that do not come. alive: whether a node is in the Ray cluster;
    once a host's is not, its address may be another's.
    """
    cluster, gke = config.cluster, section(config)
    api = kube.api(gke)

    def create(asked: Create) -> None:
        kube.create(api, raycluster(cluster, gke, owner, asked.name))

    def replace(spot: "Spot") -> str:
        return kube.replace_host(api, owner, spot.ip) if alive(spot.node_id) else ""

    return Provider(partial(kube.list_requests, api), create, partial(kube.delete, api), joined, "gke", replace)


def section(config: Config) -> Gke:
    assert config.cluster.gke is not None
    return config.cluster.gke


def upkeep(config: Config, owner: str, alive: Callable[[str], bool] = lambda _: True) -> Upkeep:
    gke = section(config)
    return Upkeep(wanted(config.cluster, gke, owner), open_provider(config, owner, alive=alive), gke.poll_s, FOREVER_S)


def wanted(cluster: Cluster, gke: Gke, owner: str) -> Wanted:
    kind = slice_type(cluster.slice, cluster.topology)
    named = cluster.name is not None
    return Wanted(owner, kind.name, kind.topology, 1, (gke.namespace,), FOREVER_S, cluster.num_slices, named)


def rendered(config: Config, owner: str) -> str:
    """The object as it would be asked for, as YAML that kubectl takes."""
    asked = raycluster(config.cluster, section(config), owner, f"gemma-{owner_label(owner)}")
    return yaml.safe_dump(json.loads(json.dumps(asked)), sort_keys=False).rstrip()  # nothing in it by reference


@contextmanager
def connect(config: Config, tell: Callable[[str, str], None], asked: Callable[[], bool]) -> Iterator[Lease]:
    """A RayCluster that is to be kept is not given back at the end."""
    cluster = config.cluster
    assert config.run.id is not None
    owner = cluster.name or config.run.id
    keeping = upkeep(config, owner, existing.is_alive)
    with managed(keeping, cluster.keep or cluster.name is not None, tell) as lease:
        at = wait_for_head(config, owner, lease.repair, asked, tell)
        code = guest.job(Path(config.run.root).expanduser() / config.run.id / "code")
        keeping.head_answers = partial(listens, at)
        with guest.joined(at) as ip, existing.connected(at, ip=ip, job=code):
            yield dataclasses.replace(lease, owns=lambda name: True)  # all of this Ray cluster is


def wait_for_head(
    config: Config, owner: str, check: Callable[[], None], asked: Callable[[], bool], tell: Callable[[str, str], None]
) -> str:
    """Its address, once it answers. Raises StoppedError, TimeoutError, and ConfigError where it is there and cannot be
    reached from here.
    """
    api, poll_s, begun = kube.api(section(config)), section(config).poll_s, time.monotonic()
    looked_at, said_at, ready_since = 0.0, begun, None
    while not asked():
        check()
        now = time.monotonic()
        if now - looked_at > poll_s:
            looked_at, head = now, head_of(api, owner)
            if head.address and listens(head.address):
                return head.address
            ready_since = (ready_since or now) if head.ready else None
            if ready_since and now - ready_since > REACH_S:
                raise ConfigError(
                    f"cluster=gke: the Ray head at {head.address} is ready and does not answer here; run this in the"
                    " network of the GKE cluster, or in one of its pods"
                )
            if now - said_at > SAY_EVERY_S:
                said_at = now
                tell("head", f"waiting for the Ray head of {owner} {head.address}".rstrip())
        if now - begun > config.timeout.reserve_s:
            raise TimeoutError(f"no Ray head within timeout.reserve_s={config.timeout.reserve_s:.0f}")
        time.sleep(0.05)
    raise StoppedError("the Ray head")


def head_of(api: kube.Api, owner: str) -> kube.Head:
    try:
        return kube.head(api, owner)
    except RefusedError:
        return kube.Head("", False)  # told by the upkeep
