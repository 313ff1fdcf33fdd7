"""An emulated Kubernetes: RayClusters, and what KubeRay, the scheduler and the machines make of them by themselves.
tests/kuberay.py serves it.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests import pods
from tests.pods import Pod

LACK = "0/9 nodes are available: 9 Insufficient google.com/tpu. preemption: 0/9 nodes are available"
SCALE_UP = "Node scale up in zones us-east5-a associated with this pod failed: GCE out of resources."
QUOTA = "exceeded quota: tpus, requested: {0}, used: {0}, limited: {0}"
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
POOLS = 9  # of nodes, as many as a slice has hosts
ABSENT = 'rpc error: code = NotFound desc = failed to pull and unpack image "docker.io/x:1": not found'


@dataclass(frozen=True)
class Settings:
    provision_s: float = 1.0
    delete_s: float = 0.2
    free: int | None = None
    quota: str = ""
    denied: str = ""
    missing: str = ""
    trouble: float = 0.0
    preempt_s: float | None = None
    notice_s: float = 5.0
    hosts: bool = True
    dashboard: bool = False


@dataclass
class Made:
    """One RayCluster."""

    body: dict[str, Any]
    at: float  # since it was asked for, or one of its slices was lost
    head: Pod | None = None
    slices: dict[int, list[Pod]] = field(default_factory=dict)
    taken_at: dict[int, float] = field(default_factory=dict)  # when a slice will be
    leaving: float | None = None  # since it was asked to go
    ready_at: float | None = None
    sentries: list[dict[str, Any]] = field(default_factory=list)  # pods that were asked for, and keep others off

    @property
    def group(self) -> dict[str, Any]:
        return dict(self.body["spec"]["workerGroupSpecs"][0])

    @property
    def pods(self) -> list[Pod]:
        return [*([self.head] if self.head else []), *(pod for there in self.slices.values() for pod in there)]


@dataclass
class Kube:
    settings: Settings
    place: pods.Place
    kubeconfig: str = ""
    made: dict[str, Made] = field(default_factory=dict)
    calls: list[tuple[float, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    preempted: bool = False
    serial: int = 0  # of pods and slices: no name is given twice
    hook: Callable[[str, str], None] = lambda verb, moment: None  # called "before" and "after" a verb is obeyed
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    def say(self, what: str) -> None:
        self.log.append(f"{time.time():.3f} {what}")


def is_up(kube: Kube, pod: Pod) -> bool:
    return pod.healthy or not kube.settings.hosts


def tick(kube: Kube) -> None:
    """What happens by itself."""
    used = 0
    for name, one in list(kube.made.items()):
        if one.leaving is not None:
            if time.monotonic() - one.leaving >= kube.settings.delete_s:
                pods.end(kube.place, one.pods)
                del kube.made[name]
                kube.say(f"{name} gone")
            continue
        if kube.settings.missing != "image":
            make_pods(kube, name, one, used)
        used += one.group["replicas"]
        describe(kube, name, one)
        due = kube.settings.preempt_s is not None and one.ready_at is not None
        if due and not kube.preempted and time.monotonic() - one.ready_at >= kube.settings.preempt_s:  # type: ignore[operator]
            preempt(kube, one)


def make_pods(kube: Kube, name: str, one: Made, used: int) -> None:
    """What KubeRay does, as far as there are nodes; used: by others."""
    settings, group = kube.settings, one.group
    if one.head is None:
        spec = one.body["spec"]["headGroupSpec"]
        head_name = f"{name}-head"
        one.head = pods.begin(kube.place, head_name, spec, "", {}) if settings.hosts else Pod(head_name)
    for index in range(group["replicas"]):
        fits = settings.free is None or used + index < settings.free
        waited = time.monotonic() - one.at >= settings.provision_s
        if index not in one.slices and fits and waited and settings.quota != "pods" and is_up(kube, one.head):
            if (pool := pool_for(kube, name, group)) is not None:
                one.slices[index] = make_workers(kube, name, one, index, pool)
                kube.say(f"{name} slice {index} has its nodes")
        elif index in one.taken_at and time.monotonic() >= one.taken_at[index]:
            pods.end(kube.place, one.slices.pop(index))  # and made again, all its hosts
            del one.taken_at[index]
            one.at = time.monotonic()
            kube.say(f"{name} slice {index} was taken away")


def pool_for(kube: Kube, name: str, group: Mapping[str, Any]) -> str | None:
    """The pool of nodes to which the scheduler brings a slice's pods, one by one: all of them go where the first does.
    None where they wait there, as some of its nodes are not allowed. Their own affinity is the web hook's.
    """
    labels = {"ray.io/cluster": name, "ray.io/node-type": "worker"}
    used = {pool_of(pod.node) for one in kube.made.values() for pod in one.pods}
    for pool in (f"pool-{n}" for n in range(POOLS)):
        nodes = [f"{pool}-{host}" for host in range(group["numOfHosts"])]
        allowed = [not any(repels(sentry, node, labels) for sentry in sentries(kube)) for node in nodes]
        if pool not in used and any(allowed):
            return pool if all(allowed) else None
    return None


def sentries(kube: Kube) -> list[dict[str, Any]]:
    return [pod for one in kube.made.values() for pod in one.sentries]


def repels(pod: dict[str, Any], node: str, labels: Mapping[str, str]) -> bool:
    """Whether a pod that is there keeps one with these labels off a node."""
    (term,) = pod["spec"]["affinity"]["podAntiAffinity"][REQUIRED]
    of = {"kubernetes.io/hostname": str, "cloud.google.com/gke-nodepool": pool_of}[term["topologyKey"]]
    return of(node) == of(pod["spec"]["nodeName"]) and term["labelSelector"]["matchLabels"].items() <= labels.items()


def pool_of(node: str) -> str:
    return node.rpartition("-")[0]


def create_pod(kube: Kube, pod: dict[str, Any]) -> bool:
    """Whether there was none of its name. It goes with the RayCluster whose it is."""
    (owner,) = pod["metadata"]["ownerReferences"]
    one = kube.made[owner["name"]]
    assert owner["uid"] == one.body["metadata"]["uid"]
    new = pod["metadata"]["name"] not in {other["metadata"]["name"] for other in one.sentries}
    if new:
        one.sentries.append(pod)
        kube.say(f"{pod['metadata']['name']} on {pod['spec']['nodeName']}")
    return new


def make_workers(kube: Kube, name: str, one: Made, index: int, pool: str) -> list[Pod]:
    kube.serial += 1
    labels = {"ray.io/worker-group-replica-name": f"{one.group['groupName']}-{kube.serial}"}
    made = [make_worker(kube, name, one, index, host) for host in range(one.group["numOfHosts"])]
    for host, pod in enumerate(made):
        pod.node, pod.labels = f"{pool}-{host}", labels
    return made


def make_worker(kube: Kube, name: str, one: Made, index: int, host: int) -> Pod:
    group = one.group
    kube.serial += 1
    pod_name = f"{name}-{group['groupName']}-worker-{kube.serial}"
    if not kube.settings.hosts:
        return Pod(pod_name, apart=f"10.0.{kube.serial // 256}.{kube.serial % 256}")
    chips = one.group["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    told = {"TPU_NAME": f"{group['groupName']}-{index}", "TPU_WORKER_ID": str(host)}  # by the web hook
    told |= {"TPU_ACCELERATOR_TYPE": group["groupName"], "TPU_TOPOLOGY": chips}  # by the machine
    assert one.head is not None
    return pods.begin(kube.place, pod_name, group, f"{one.head.ip}:{one.head.port}", told)


def describe(kube: Kube, name: str, one: Made) -> None:
    """What KubeRay writes into the object."""
    group = one.group
    wanted = group["replicas"] * group["numOfHosts"]
    up = sum(is_up(kube, pod) for there in one.slices.values() for pod in there)
    if up == wanted and one.ready_at is None:
        one.ready_at = time.monotonic()
        kube.say(f"{name} ready")
    status: dict[str, Any] = {"readyWorkerReplicas": up, "desiredWorkerReplicas": wanted, "conditions": []}
    if one.head is not None:
        status["head"] = {"podIP": one.head.ip}
        status["endpoints"] = {"gcs-server": str(one.head.port)}
        head_ready = "True" if kube.settings.hosts and one.head.healthy else "False"
        status["conditions"].append({"type": "HeadPodReady", "status": head_ready})
    if kube.settings.quota == "pods":
        said = f'pods "{name}-worker" is forbidden: {QUOTA.format("requests.google.com/tpu=4")}'
        status["conditions"].append({"type": "ReplicaFailure", "status": "True", "message": said})
    if one.ready_at is not None:
        status["state"] = "ready"  # it stays so while single pods are replaced
    one.body["status"] = status


def preempt(kube: Kube, one: Made) -> None:
    kube.preempted = True
    for pod in one.slices[0]:
        pods.warn(pod)
    one.taken_at[0] = time.monotonic() + kube.settings.notice_s
    kube.say(f"{one.body['metadata']['name']} slice 0 is told that it will be taken away")


def delete_pods(kube: Kube, names: Collection[str]) -> None:
    """KubeRay ends the others of their slices too."""
    for one in kube.made.values():
        for index, there in one.slices.items():
            for pod in there:
                pod.leaving = pod.leaving or pod.name in names
            if any(pod.leaving for pod in there):
                one.taken_at.setdefault(index, time.monotonic())


def select(found: list[dict[str, Any]], query: Mapping[str, str]) -> list[dict[str, Any]]:
    """By labels and fields, as far as they are asked for here."""
    asked = re.findall(r"([\w./-]+)(?: in \(([^)]*)\)|=([^,]*))?,?", query.get("labelSelector", ""))
    wanted = [
        (key, set((several or single).split(",")) if several or single else None) for key, several, single in asked
    ]
    found = [one for one in found if all(fits(one["metadata"]["labels"].get(key), some) for key, some in wanted)]
    for path, _, value in (part.partition("=") for part in query.get("fieldSelector", "").split(",") if part):
        section, field_name = path.split(".")
        found = [one for one in found if one[section].get(field_name) == value]
    return found


def fits(value: str | None, some: Collection[str] | None) -> bool:
    return value is not None if some is None else value in some


def all_pods(kube: Kube) -> list[dict[str, Any]]:
    """As the API tells of them."""
    found = []
    for name, one in kube.made.items():
        group = one.group
        labels = group["template"]["metadata"]["labels"] | {"ray.io/cluster": name}
        if kube.settings.missing == "image":
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "docker.io/x:1": {ABSENT}'}
            status = {
                "phase": "Pending",
                "containerStatuses": [{"image": "docker.io/x:1", "state": {"waiting": waiting}}],
            }
            found.append({"metadata": {"name": f"{name}-head", "labels": labels}, "status": status})
        for pod in one.pods:
            status = {"phase": "Running", "podIP": pod.ip, "conditions": [{"type": "PodScheduled", "status": "True"}]}
            metadata = {"name": pod.name, "labels": labels | pod.labels}
            if pod.leaving:
                metadata["deletionTimestamp"] = one.body["metadata"]["creationTimestamp"]
            found.append({"metadata": metadata, "spec": {"nodeName": pod.node}, "status": status})
        for index in {*range(group["replicas"])} - one.slices.keys():
            lack = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": LACK}
            pending = {"phase": "Pending", "conditions": [lack]}
            found.append({"metadata": {"name": f"{name}-{index}", "labels": labels}, "status": pending})
    return found
