"""The pods that KubeRay makes of a RayCluster: `ray start` as it calls it, here processes of this machine."""

import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.slices.simulated import simulated
from orchestrator.slices.simulated.reaper import kill_groups
from tests import metadata_server

FIRST = 21  # addresses 127.0.1.21 and up
# And up, by address: on one machine no two may have the same, as Ray listens at all addresses.
HEAD_PORT, CLIENT_PORT, AGENT_PORT, METRICS_PORT = 21000, 22000, 23000, 24000
NOWHERE, NO_PORT = "127.0.0.1", 1  # nobody is there
LOOK_S, LOOK_AGAIN_S = 0.25, 3.0  # from probe to probe, before and after it was healthy
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]


@dataclass
class Place:
    """They end with it."""

    folder: Path
    reaper: Any
    dashboard: bool = False  # the heads have one
    used: set[int] = field(default_factory=set)  # numbers of addresses


@dataclass
class Pod:
    name: str
    number: int = 0  # of its address; 0 where nothing runs
    head: str = ""  # whose address it joins; empty where it is one
    group: Mapping[str, Any] = field(default_factory=dict)  # of the RayCluster, that it is of
    env: dict[str, str] = field(default_factory=dict)  # what it is told besides
    process: Any = None
    served: Any = None  # the context in which its machine's metadata server lives
    metadata: Any = None
    healthy: bool = False
    probed_at: float = 0.0
    node: str = ""  # where it is
    labels: dict[str, str] = field(default_factory=dict)  # besides those of its group
    apart: str = ""  # its address where nothing runs
    leaving: bool = False

    @property
    def ip(self) -> str:
        return f"127.0.1.{self.number}" if self.number else self.apart or NOWHERE

    @property
    def port(self) -> int:
        """Where it listens, if it is a head."""
        return HEAD_PORT + self.number if self.number else NO_PORT


def begin(place: Place, name: str, group: Mapping[str, Any], head: str, told: dict[str, str]) -> Pod:
    """head: whose address it joins; empty where it is one itself. told: what GKE's web hook and machine tell it."""
    number = next(n for n in range(FIRST, 255) if n not in place.used and is_free(HEAD_PORT + n))
    place.used.add(number)
    pod = Pod(name, number, head, group, told)
    if head:
        pod.served = metadata_server.serve()
        pod.metadata = pod.served.__enter__()
        pod.env = told | {"GCE_METADATA_HOST": pod.metadata.host}
    start(place, pod)
    return pod


def start(place: Place, pod: Pod) -> None:
    """Its container, for the first time or again."""
    container = pod.group["template"]["spec"]["containers"][0]
    limits, given = container["resources"]["limits"], dict(pod.group["rayStartParams"])
    given |= {"block": None, "node-ip-address": pod.ip, "dashboard-agent-listen-port": str(AGENT_PORT + pod.number)}
    given |= {"metrics-export-port": str(METRICS_PORT + pod.number), "object-store-memory": "83886080"}
    own = place.folder / pod.ip  # a container has a /tmp and a home of its own
    own.mkdir(exist_ok=True)
    given["temp-dir"] = str(own / "ray")
    if "google.com/tpu" in limits:
        given["resources"] = f'{{"TPU": {limits["google.com/tpu"]}}}'
    if pod.head:
        given["address"] = pod.head
    else:
        given |= {"head": None, "port": str(pod.port), "ray-client-server-port": str(CLIENT_PORT + pod.number)}
        given |= {"include-dashboard": str(place.dashboard).lower(), "dashboard-host": pod.ip}
    env = {one["name"]: one["value"] for one in container.get("env", ())} | pod.env
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env |= {"PATH": path, "TMPDIR": str(own), "HOME": str(own), "RAY_enable_open_telemetry": "0"}
    # The code is not in the image: what a host runs is what it was given, and what it compiled shows it.
    env |= {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": ""}
    options = [f"--{name}" if value is None else f"--{name}={value}" for name, value in given.items()]
    pod.healthy = False
    pod.process = simulated.spawn(place.reaper, place.folder / f"{pod.name}.log", env, [*RAY, *options])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def look_after(place: Place, pod: Pod, lock: threading.RLock) -> None:
    """What the kubelet does: probes as KubeRay says, and starts what exited. lock: under which pods are ended."""
    with lock:
        if pod.process is None:
            return
        if pod.process.poll() is not None:
            start(place, pod)
    every_s = LOOK_AGAIN_S if pod.healthy else LOOK_S
    if time.monotonic() - pod.probed_at >= every_s:
        pod.probed_at = time.monotonic()
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(f"http://{pod.ip}:{AGENT_PORT + pod.number}/api/healthz", timeout=2.0).close()
            pod.healthy = True
        except OSError:
            pod.healthy = False


def warn(pod: Pod) -> None:
    """What a spot machine is told."""
    if pod.metadata is not None:
        pod.metadata.says["instance/preempted"] = "TRUE"


def end(place: Place, pods: list[Pod]) -> None:
    running = [pod for pod in pods if pod.process is not None]
    kill_groups({pod.process.pid for pod in running})
    for pod in running:
        pod.process.wait(5.0)
        pod.process = None
        if pod.served is not None:
            pod.served.__exit__(None, None, None)
        place.used.discard(pod.number)
