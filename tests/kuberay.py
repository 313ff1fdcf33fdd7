"""Kubernetes' API on loopback, as far as RayClusters and their pods go, with KubeRay behind it: spoken to by
Kubernetes' own client. The pods are processes here.

python -m tests.kuberay [provision_s=1] [free=SLICES] [quota=true] [denied=create|list|delete] [trouble=0.2]
                        [preempt_s=S] [notice_s=5] [hosts=true]

Prints the overrides with which launch.train uses it, and what it has been asked for as it goes. Ends with Ctrl-C.

free: there are nodes for so many slices, the pods of others wait. quota: there is none. denied: a verb is forbidden.
trouble: this share of calls fails with 500s, half of them after they were obeyed. preempt_s: the first slice of the
first RayCluster is taken away so long after it was there, notice_s after its hosts were told; KubeRay makes it anew.
"""

import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from orchestrator.slices import simulated
from tests import pods

TICK_S, LOOK_S = 0.05, 0.5
LACK = "0/9 nodes are available: 9 Insufficient google.com/tpu. preemption: 0/9 nodes are available"
QUOTA = "rayclusters.ray.io is forbidden: exceeded quota: tpus, requested: google.com/tpu=8, limited: google.com/tpu=0"


@dataclass(frozen=True)
class Settings:
    provision_s: float = 1.0
    delete_s: float = 0.2
    free: int | None = None
    quota: bool = False
    denied: str = ""
    trouble: float = 0.0
    preempt_s: float | None = None
    notice_s: float = 5.0
    hosts: bool = True


@dataclass
class Made:
    """One RayCluster."""

    body: dict[str, Any]
    at: float
    head: Any = None
    slices: dict[int, pods.Slice] = field(default_factory=dict)
    leaving: float | None = None  # since it was asked to go
    ready_at: float | None = None
    looked_at: float = 0.0


@dataclass
class Kube:
    settings: Settings
    place: pods.Place
    kubeconfig: str = ""
    made: dict[str, Made] = field(default_factory=dict)
    calls: list[tuple[float, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    preempted: bool = False
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    def say(self, what: str) -> None:
        self.log.append(f"{time.time():.3f} {what}")


def tick(kube: Kube) -> None:
    """What the operator, and the machines, do by themselves."""
    used = 0
    for name, one in list(kube.made.items()):
        age_s = time.monotonic() - one.at
        group = one.body["spec"]["workerGroupSpecs"][0]
        if one.leaving is not None:
            if time.monotonic() - one.leaving >= kube.settings.delete_s:
                pods.end(kube.place, one.head, list(one.slices.values()))
                del kube.made[name]
                kube.say(f"{name} gone")
            continue
        if one.head is None:
            one.head = pods.head(kube.place, name) if kube.settings.hosts else pods.NOTHING
        if time.monotonic() - one.looked_at >= LOOK_S:
            one.looked_at = time.monotonic()
            pods.look_after(one.head, list(one.slices.values()))
        for index in range(group["replicas"]):
            used += 1
            there = one.slices.get(index)
            fits = kube.settings.free is None or used <= kube.settings.free
            if there is None and fits and age_s >= kube.settings.provision_s and pods.is_up(one.head):
                one.slices[index] = pods.begin(kube.place, name, group, index, one.head, kube.settings.hosts)
                kube.say(f"{name} slice {index} has its nodes")
            elif there is not None and there.taken_at is not None and time.monotonic() >= there.taken_at:
                pods.end(kube.place, None, [there])
                del one.slices[index]  # and made anew, all its hosts
                one.at = time.monotonic()
                kube.say(f"{name} slice {index} was taken away")
        tell(kube, name, one, group)


def tell(kube: Kube, name: str, one: Made, group: dict[str, Any]) -> None:
    up = sum(group["numOfHosts"] for there in one.slices.values() if pods.is_up(there))
    ready = up == group["replicas"] * group["numOfHosts"]
    if ready and one.ready_at is None:
        one.ready_at = time.monotonic()
        kube.say(f"{name} ready")
    one.body["status"] = {"readyWorkerReplicas": up, "desiredWorkerReplicas": group["replicas"] * group["numOfHosts"]}
    if pods.is_up(one.head):
        one.body["status"]["head"] = {"podIP": one.head.ip}
    if one.ready_at is not None:
        one.body["status"]["state"] = "ready"  # as KubeRay has it: it stays so while single pods are replaced
        due = kube.settings.preempt_s is not None and time.monotonic() - one.ready_at >= kube.settings.preempt_s
        if due and not kube.preempted:
            preempt(kube, one)


def preempt(kube: Kube, one: Made) -> None:
    kube.preempted = True
    pods.warn(one.slices[0], kube.settings.notice_s)
    kube.say(f"{one.body['metadata']['name']} slice 0 is told that it will be taken away")


def pending(kube: Kube) -> list[dict[str, Any]]:
    """The pods that have no node."""
    found = []
    for name, one in kube.made.items():
        group = one.body["spec"]["workerGroupSpecs"][0]
        for index in range(group["replicas"]):
            if index not in one.slices:
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": LACK}
                labels = group["template"]["metadata"]["labels"] | {"ray.io/cluster": name}
                found.append(
                    {
                        "metadata": {"name": f"{name}-{index}", "labels": labels},
                        "status": {"phase": "Pending", "conditions": [condition]},
                    }
                )
    return found


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.answer = {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": status}


def obey(kube: Kube, method: str, path: str, query: dict[str, str], body: Any) -> Any:
    parts = path.strip("/").split("/")
    verb = {"GET": "list", "POST": "create", "DELETE": "delete"}[method]
    if kube.settings.denied == verb:
        raise Refused(403, "Forbidden", f'rayclusters.ray.io is forbidden: User "me" cannot {verb} resource')
    if parts[-1] == "pods":
        return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pending(kube)}
    at = parts.index("rayclusters")
    if method == "GET":
        found = [one.body for one in kube.made.values() if query.get("labelSelector") in one.body["metadata"]["labels"]]
        first, limit = int(query.get("continue") or 0), int(query.get("limit", 500))
        after = {"continue": str(first + limit)} if first + limit < len(found) else {}
        return {"kind": "RayClusterList", "metadata": after, "items": found[first : first + limit]}
    if method == "POST":
        name = body["metadata"]["name"]
        if kube.settings.quota:
            raise Refused(403, "Forbidden", QUOTA)
        if name in kube.made:
            raise Refused(409, "AlreadyExists", f"{name} already exists")
        body["metadata"]["creationTimestamp"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        kube.made[name] = Made(body, time.monotonic())
        kube.say(f"{name} asked for")
        return body
    name = parts[at + 1]
    if name not in kube.made:
        raise Refused(404, "NotFound", f"{name} not found")
    one = kube.made[name]
    if one.leaving is None:
        one.leaving = time.monotonic()
        one.body["metadata"]["deletionTimestamp"] = one.body["metadata"]["creationTimestamp"]
        kube.say(f"{name} is to go")
    return one.body


def answer(kube: Kube, method: str, path: str, body: Any) -> tuple[int, Any]:
    split = urlsplit(path)
    query = {key: values[0] for key, values in parse_qs(split.query).items()}
    trouble = 500, {"kind": "Status", "code": 500, "reason": "InternalError", "message": "by script"}
    with kube.lock:
        kube.calls.append((time.time(), f"{method} {split.path}"))
        bad = kube.dice.random() < kube.settings.trouble
        if bad and kube.dice.random() < 0.5:
            return trouble
        try:
            found = obey(kube, method, split.path, query, body)
        except Refused as refused:
            return refused.answer["code"], refused.answer
        return trouble if bad else (200, json.loads(json.dumps(found)))


def handler(kube: Kube) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, found = answer(kube, self.command, self.path, body)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = reply  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serve(settings: Settings) -> Iterator[Kube]:
    folder = Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp"))
    reaper = simulated.start_reaper(folder)
    kube = Kube(settings, pods.Place(folder, reaper))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(kube))
    named = {"name": "emulated"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "emulated",
        "clusters": [named | {"cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [named | {"context": {"cluster": "emulated", "user": "emulated"}}],
        "users": [named | {"user": {}}],
    }
    kube.kubeconfig = str(folder / "kubeconfig")
    Path(kube.kubeconfig).write_text(yaml.safe_dump(config))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def go_on() -> None:
        while not kube.ended.wait(TICK_S):
            with kube.lock:
                tick(kube)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield kube
    finally:
        kube.ended.set()
        thread.join(10)
        server.shutdown()
        server.server_close()
        simulated.end(folder, reaper)


def overrides(kube: Kube) -> list[str]:
    at = f"cluster.gke.kubeconfig={kube.kubeconfig}"
    return ["cluster=gke", at, "cluster.gke.image=emulated", "cluster.gke.poll_s=0.2"]


def main() -> None:
    found: dict[str, Any] = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for key, value in found.items():
        if key in ("hosts", "quota"):
            found[key] = value == "true"
        elif key != "denied":
            found[key] = int(value) if key == "free" else float(value)
    with serve(Settings(**found)) as kube:
        print(" ".join(overrides(kube)), flush=True)
        shown = 0
        try:
            while True:
                time.sleep(0.2)
                for line in kube.log[shown:]:
                    print(line, flush=True)
                shown = len(kube.log)
        except KeyboardInterrupt:
            print(f"asked {len(kube.calls)} times; left: {' '.join(sorted(kube.made)) or 'nothing'}", flush=True)


if __name__ == "__main__":
    main()
