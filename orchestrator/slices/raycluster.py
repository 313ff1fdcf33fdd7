"""The RayCluster that a run asks KubeRay for: a head, and one worker group of TPU slices. Pure.

Sources: KubeRay's API (ray.io/v1, numOfHosts, status), its web hook for TPUs (TPU_WORKER_ID, TPU_NAME, one node pool a
slice), and cloud.google.com/kubernetes-engine/docs/concepts/tpus (selectors, google.com/tpu).
"""

from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from orchestrator.slices.cluster import Cluster, Gke, check_complete
from orchestrator.slices.topology import CHIPS_PER_HOST, slice_type
from orchestrator.slices.wanted import Request, State, owner_label

OURS = "gemma-orchestrator"  # a label of all that this software has asked for
OWNER, SLICE, TOPOLOGY, CAPACITY = "gemma-owner", "gemma-slice", "gemma-topology", "gemma-capacity"
SPOT = "cloud.google.com/gke-spot"
HOSTNAME, POOL = "kubernetes.io/hostname", "cloud.google.com/gke-nodepool"  # labels of nodes
CLUSTER = "ray.io/cluster"  # KubeRay's label of a pod
OBJECT_STORE_BYTES = 1 << 30  # what is large goes by other ways; Ray would take a third of the memory
HEAD_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A host that is gone is to be noticed within seconds.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
}
HEAD_START = {"num-cpus": "0", "dashboard-host": "0.0.0.0"}
WORKER_START = {
    "num-cpus": "1",  # a process stands by for each, and a host runs one
    "metrics-export-port": "8090",  # KubeRay's 8080 is where slices speak to one another
}


def raycluster(cluster: Cluster, gke: Gke, owner: str, name: str) -> dict[str, Any]:
    """All slices of a run as one object: KubeRay makes them, and makes a lost one anew as a whole. Raises ConfigError
    where something is missing.
    """
    check_complete(gke)
    kind = slice_type(cluster.slice, cluster.topology)
    labels = {OURS: "1", OWNER: owner_label(owner)}
    told = {OWNER: owner, SLICE: kind.name, TOPOLOGY: kind.topology, CAPACITY: cluster.capacity}
    workers = {
        "groupName": kind.name,
        "replicas": cluster.num_slices,
        "minReplicas": cluster.num_slices,
        "maxReplicas": cluster.num_slices,
        "numOfHosts": kind.hosts,
        "rayStartParams": WORKER_START | {"object-store-memory": str(OBJECT_STORE_BYTES)},
        "template": {"metadata": {"labels": labels}, "spec": worker(cluster.capacity, gke, kind.topology)},
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": gke.namespace, "labels": labels, "annotations": told},
        "spec": {
            "rayVersion": version("ray"),
            "headGroupSpec": {
                "rayStartParams": HEAD_START | {"object-store-memory": str(OBJECT_STORE_BYTES)},
                "template": {"metadata": {"labels": labels}, "spec": head(gke)},
            },
            "workerGroupSpecs": [workers],
        },
    }


def head(gke: Gke) -> dict[str, Any]:
    """The pod of the Ray head: not on a machine that may be taken away, nor on a TPU host."""
    others = [{"key": key, "operator": "DoesNotExist"} for key in (SPOT, "cloud.google.com/gke-tpu-accelerator")]
    terms = {"nodeSelectorTerms": [{"matchExpressions": others}]}
    container = {
        "name": "ray-head",
        "env": [{"name": key, "value": value} for key, value in HEAD_ENV.items()],
        "resources": alike({"cpu": str(gke.head_cpus), "memory": f"{gke.head_memory_gib}Gi"}),
    }
    return pod(gke, container, []) | {
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
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
    found = pod(gke, {"name": "ray-worker", "resources": alike(resources)}, [(memory, "/dev/shm")])
    found["nodeSelector"] = selector
    if gke.host_network:
        found |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if capacity == "spot":
        found["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    return found


def pod(gke: Gke, container: dict[str, Any], volumes: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """volumes: each with its place in the container."""
    claim = {"name": "shared", "persistentVolumeClaim": {"claimName": gke.claim}}
    everything = [*volumes, (claim, gke.mount)]
    mounts = [{"name": volume["name"], "mountPath": path} for volume, path in everything]
    account = {"serviceAccountName": gke.service_account} if gke.service_account else {}
    return account | {
        "containers": [{"image": gke.image} | container | {"volumeMounts": mounts}],
        "volumes": [volume for volume, _ in everything],
    }


def alike(resources: dict[str, str]) -> dict[str, dict[str, str]]:
    """Asked for is what may be used: such pods are the last to be evicted."""
    return {"limits": resources, "requests": resources}


def sentry(found: Mapping[str, Any], node: str) -> dict[str, Any]:
    """A pod on a node with a bad host, which keeps this RayCluster's TPU hosts off it, and off the rest of its slice.

    To say so in their template would not do: the web hook gives pods of slices of several hosts another affinity. But
    the scheduler heeds that of pods which are there already, against those that come.
    """
    metadata, group = found["metadata"], found["spec"]["workerGroupSpecs"][0]
    owner = {"apiVersion": found["apiVersion"], "kind": found["kind"], "name": metadata["name"], "uid": metadata["uid"]}
    hosts = {CLUSTER: metadata["name"], "ray.io/node-type": "worker"}
    where = POOL if group["numOfHosts"] > 1 else HOSTNAME
    term = {"labelSelector": {"matchLabels": hosts}, "topologyKey": where}
    image = group["template"]["spec"]["containers"][0]["image"]  # it is on that node
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{metadata['name']}-off-{sha256(node.encode()).hexdigest()[:8]}",
            "labels": metadata["labels"],
            "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "true"},  # it goes with its node
            "ownerReferences": [owner],  # and with the RayCluster
        },
        "spec": {
            "nodeName": node,  # no scheduler is asked: the hosts are there still, which it would keep off
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}},
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "sentry", "image": image, "command": ["sleep", "infinity"]}],
        },
    }


def told(found: Mapping[str, Any], why: str, since: float, hopeless: bool = False) -> Request:
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
