"""The RayCluster that a run asks KubeRay for, from raycluster.yaml.j2, and what such an object says of itself.

Sources: KubeRay's API (ray.io/v1, numOfHosts, status), its web hook for TPUs (TPU_WORKER_ID, TPU_NAME, one node pool a
slice), and cloud.google.com/kubernetes-engine/docs/concepts/tpus (selectors, google.com/tpu).
"""

from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from orchestrator.slices.cluster import Cluster, Gke, check_complete
from orchestrator.slices.topology import CHIPS_PER_HOST, slice_type
from orchestrator.slices.wanted import Request, State, owner_label

OURS = "gemma-orchestrator"  # a label of all that this software has asked for
OWNER, SLICE, TOPOLOGY, CAPACITY = "gemma-owner", "gemma-slice", "gemma-topology", "gemma-capacity"
SPOT = "cloud.google.com/gke-spot"
HOSTNAME, POOL = "kubernetes.io/hostname", "cloud.google.com/gke-nodepool"  # labels of nodes
CLUSTER = "ray.io/cluster"  # KubeRay's label of a pod
OBJECT_STORE_BYTES = 1 << 30  # what is large goes by other ways; Ray would take a third of the memory


def raycluster(cluster: Cluster, gke: Gke, owner: str, name: str) -> dict[str, Any]:
    """All slices of a run as one object: KubeRay makes them, and makes a lost one again as a whole. Raises ConfigError
    where something is missing.
    """
    check_complete(gke)
    return rendered(
        "raycluster.yaml.j2",
        cluster=cluster,
        gke=gke,
        owner=owner,
        owner_label=owner_label(owner),
        name=name,
        slice=slice_type(cluster.slice, cluster.topology),
        ray_version=version("ray"),
        object_store_bytes=OBJECT_STORE_BYTES,
        chips_per_host=CHIPS_PER_HOST,
    )


def sentry(found: Mapping[str, Any], node: str) -> dict[str, Any]:
    """A pod on a node with a bad host, which keeps this RayCluster's TPU hosts off it, and off the rest of its slice.

    To say so in their template would not do: the web hook gives pods of slices of several hosts another affinity. But
    the scheduler heeds that of pods which are there already, against those that come.
    """
    group = found["spec"]["workerGroupSpecs"][0]
    return rendered(
        "sentry.yaml.j2",
        found=found,
        node=node,
        name=f"{found['metadata']['name']}-off-{sha256(node.encode()).hexdigest()[:8]}",
        topology_key=POOL if group["numOfHosts"] > 1 else HOSTNAME,
        image=group["template"]["spec"]["containers"][0]["image"],  # it is on that node
    )


def rendered(template: str, **values: Any) -> dict[str, Any]:
    """A template beside this file, as the object that it describes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found: dict[str, Any] = yaml.safe_load(environment.get_template(template).render(values))
    return found


def as_request(found: Mapping[str, Any], why: str, since: float, hopeless: bool = False) -> Request:
    """What such an object says of itself. why: its pods wait, and whether they will for ever."""
    metadata, status = found["metadata"], found.get("status") or {}
    group = found["spec"]["workerGroupSpecs"][0]
    annotations = metadata.get("annotations") or {}
    there = status.get("readyWorkerReplicas", 0) >= group["replicas"] * group.get("numOfHosts", 1)
    state = State.READY if there and status.get("state") == "ready" else State.WAITING
    if metadata.get("deletionTimestamp"):
        state = State.GOING
    failure = condition(status, "ReplicaFailure")  # the operator is not allowed to make its pods
    return Request(
        name=metadata["name"],
        zone=metadata["namespace"],
        owner=annotations.get(OWNER, ""),
        state=state,
        slice=annotations.get(SLICE, ""),
        topology=annotations.get(TOPOLOGY, ""),
        since=since,
        why=(failure or why) if state is State.WAITING else "",
        capacity=annotations.get(CAPACITY, ""),
        slices=group["replicas"],
        hopeless=state is State.WAITING and (hopeless or "exceeded quota" in failure),
    )


def condition(status: Mapping[str, Any], kind: str) -> str:
    """Its message where it holds, else nothing."""
    found = [one for one in status.get("conditions") or () if one["type"] == kind and one["status"] == "True"]
    return " ".join((found[0].get("message") or kind).split()) if found else ""


def waits(pod: Mapping[str, Any]) -> tuple[str, bool]:
    """Why a pod that is not running is not, as Kubernetes tells it, and whether that will last; nothing where nothing
    is amiss.
    """
    status = pod.get("status") or {}
    for one in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        reason = ((one.get("state") or {}).get("waiting") or {}).get("reason", "")
        if reason.startswith(("ErrImage", "ImagePull", "InvalidImage", "CreateContainer", "CrashLoop")):
            said = one["state"]["waiting"].get("message") or ""
            lasts = reason == "InvalidImageName" or reason.endswith("PullBackOff") and "not found" in said.lower()
            return f"{reason} {one.get('image', '')}: {said}".rstrip(": "), lasts
    for one in status.get("conditions") or ():
        if one["type"] == "PodScheduled" and one["status"] == "False" and one.get("message"):
            return str(one["message"]), False
    return "", False
