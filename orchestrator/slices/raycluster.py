"""The RayCluster that a run asks KubeRay for: a head, and one worker group of TPU slices. Pure.

Source: docs.ray.io/en/latest/cluster/kubernetes (RayCluster, numOfHosts) and
cloud.google.com/kubernetes-engine/docs/concepts/tpus (selectors, google.com/tpu).
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from orchestrator.cluster import Cluster, Gke
from orchestrator.slices.wanted import Request, State, owner_label
from orchestrator.topology import CHIPS_PER_HOST, slice_type

OURS = "gemma-orchestrator"  # a label of all that this software has asked for
OWNER, SLICE, TOPOLOGY, CAPACITY = "gemma-owner", "gemma-slice", "gemma-topology", "gemma-capacity"
SPOT = "cloud.google.com/gke-spot"


def raycluster(cluster: Cluster, gke: Gke, owner: str, name: str) -> dict[str, Any]:
    """All slices of a run as one object: KubeRay makes them, and makes a lost one anew as a whole."""
    kind = slice_type(cluster.slice, cluster.topology)
    labels = {OURS: "1", OWNER: owner_label(owner)}
    told = {OWNER: owner, SLICE: kind.name, TOPOLOGY: kind.topology, CAPACITY: cluster.capacity}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": gke.namespace, "labels": labels, "annotations": told},
        "spec": {
            "rayVersion": version("ray"),
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                "template": {"metadata": {"labels": labels}, "spec": head(gke)},
            },
            "workerGroupSpecs": [
                {
                    "groupName": kind.name,
                    "replicas": cluster.num_slices,
                    "minReplicas": cluster.num_slices,
                    "maxReplicas": cluster.num_slices,
                    "numOfHosts": kind.hosts,
                    "rayStartParams": {},
                    "template": {
                        "metadata": {"labels": labels},
                        "spec": worker(cluster.capacity, gke, kind.topology),
                    },
                }
            ],
        },
    }


def head(gke: Gke) -> dict[str, Any]:
    """The pod of the Ray head: not on a machine that may be taken away."""
    kept = {"matchExpressions": [{"key": SPOT, "operator": "DoesNotExist"}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [kept]}}}
    resources = {"cpu": str(gke.head_cpus), "memory": f"{gke.head_memory_gib}Gi"}
    return pod(gke, {"name": "ray-head", "resources": {"limits": resources, "requests": resources}}) | {
        "affinity": affinity
    }


def worker(capacity: str, gke: Gke, topology: str) -> dict[str, Any]:
    """The pod of a TPU host."""
    selector = {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": topology,
    }
    if capacity == "spot":
        selector[SPOT] = "true"
    if capacity == "reserved":
        selector["cloud.google.com/reservation-name"] = str(gke.reservation)
    resources = {"cpu": str(gke.cpus), "memory": f"{gke.memory_gib}Gi", "google.com/tpu": str(CHIPS_PER_HOST)}
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{gke.shared_memory_gib}Gi"}}
    container = {
        "name": "ray-worker",
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    found = pod(gke, container) | {"nodeSelector": selector, "volumes": [memory]}
    if capacity == "spot":
        found["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    return found


def pod(gke: Gke, container: dict[str, Any]) -> dict[str, Any]:
    account = {"serviceAccountName": gke.service_account} if gke.service_account else {}
    return account | {"containers": [{"image": gke.image} | container]}


def told(found: Mapping[str, Any], why: str, since: float) -> Request:
    """What such an object says of itself. why: its pods wait."""
    metadata, spec, status = found["metadata"], found["spec"], found.get("status") or {}
    group = spec["workerGroupSpecs"][0]
    given = metadata.get("annotations") or {}
    there = status.get("readyWorkerReplicas", 0) >= group["replicas"] * group.get("numOfHosts", 1)
    state = State.READY if there and status.get("state") == "ready" else State.WAITING
    if metadata.get("deletionTimestamp"):
        state = State.GOING
    return Request(
        name=metadata["name"],
        zone=metadata["namespace"],
        owner=given.get(OWNER, ""),
        state=state,
        slice=given.get(SLICE, ""),
        topology=given.get(TOPOLOGY, ""),
        since=since,
        why=why if state is State.WAITING else "",
        capacity=given.get(CAPACITY, ""),
        slices=group["replicas"],
    )
