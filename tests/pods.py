"""What KubeRay makes of a RayCluster: `ray start` in each pod, here a process of this machine."""

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]

from orchestrator.slices import simulated
from orchestrator.slices.reaper import kill_groups
from tests import metadata_server

FIRST = 21  # addresses 127.0.1.21 and up
PORT = 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


@dataclass
class Place:
    """They end with it."""

    folder: Path
    reaper: Any
    used: set[int] = field(default_factory=set)  # numbers of addresses


@dataclass
class Pod:
    ip: str
    process: Any  # None where nothing runs
    served: Any = None  # the context in which its machine's metadata server lives
    metadata: Any = None
    again: Callable[[], Any] | None = None  # starts it: a container that exits is started anew
    healthy: bool = False


@dataclass
class Slice:
    """The pods of one."""

    pods: list[Pod]
    begun: float
    taken_at: float | None = None


NOTHING = Pod("127.0.1.21", None)


def address(place: Place) -> str:
    number = next(n for n in range(FIRST, 255) if n not in place.used)
    place.used.add(number)
    return f"127.0.1.{number}"


def start(place: Place, name: str, ip: str, env: dict[str, str], options: list[str]) -> Any:
    own = place.folder / ip  # a container has a /tmp of its own
    own.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": path, "TMPDIR": str(own), "RAY_enable_open_telemetry": "0"} | env
    command = [*RAY, f"--node-ip-address={ip}", *options]
    return simulated.spawn(place.reaper, place.folder / f"{name}-{ip}.log", given, command)


def head(place: Place, name: str) -> Pod:
    ip = address(place)
    options = ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
    return Pod(ip, start(place, name, ip, {}, [*options, f"--temp-dir={place.folder / ip / 'ray'}"]))


def is_up(what: Pod | Slice) -> bool:
    """A head once its own node is in the Ray cluster, a slice once all its pods' are."""
    if isinstance(what, Slice):
        return all(pod.process is None or pod.healthy for pod in what.pods)
    return what.process is None or what.healthy


def look_after(head: Pod, slices: list[Slice]) -> None:
    """What the kubelet does: probes, and starts what exited."""
    if head.process is None:
        return
    nodes = set()
    with suppress(OSError, RuntimeError), socket.create_connection((head.ip, PORT), timeout=1.0):
        found = GcsClient(address=f"{head.ip}:{PORT}").get_all_node_info(timeout=2.0).values()
        nodes = {info.node_manager_address for info in found if info.state == 0}  # alive
    for pod in [head, *(pod for there in slices for pod in there.pods)]:
        pod.healthy = pod.ip in nodes
        if pod.again is not None and pod.process.poll() is not None:
            pod.process = pod.again()


def begin(place: Place, name: str, group: dict[str, Any], index: int, head: Pod, real: bool) -> Slice:
    """All hosts of a slice, with what GKE's web hook tells them."""
    made = Slice([], time.monotonic())
    template = group["template"]["spec"]
    chips = template["containers"][0]["resources"]["limits"]["google.com/tpu"]
    topology = template["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    for worker in range(group["numOfHosts"]):
        if not real:
            made.pods.append(Pod("", None))
            continue
        ip = address(place)
        served = metadata_server.serve()
        metadata = served.__enter__()
        env = {
            "GCE_METADATA_HOST": metadata.host,
            "TPU_NAME": f"{group['groupName']}-{index}",
            "TPU_WORKER_ID": str(worker),
            "TPU_ACCELERATOR_TYPE": group["groupName"],
            "TPU_TOPOLOGY": topology,
        }
        options = [f"--address={head.ip}:{PORT}", "--num-cpus=1", f'--resources={{"TPU": {chips}}}']
        options += ["--object-store-memory=83886080"]
        again = partial(start, place, name, ip, env, options)
        made.pods.append(Pod(ip, again(), served, metadata, again))
    return made


def warn(there: Slice, notice_s: float) -> None:
    """What a spot machine is told."""
    there.taken_at = time.monotonic() + notice_s
    for pod in there.pods:
        if pod.metadata is not None:
            pod.metadata.says["instance/preempted"] = "TRUE"


def end(place: Place, head: Pod | None, slices: list[Slice]) -> None:
    everyone = [pod for there in slices for pod in there.pods] + ([head] if head is not None else [])
    running = [pod for pod in everyone if pod.process is not None]
    kill_groups({pod.process.pid for pod in running})
    for pod in running:
        pod.process.wait(5.0)
        if pod.served is not None:
            pod.served.__exit__(None, None, None)
        place.used.discard(int(pod.ip.rpartition(".")[2]))
