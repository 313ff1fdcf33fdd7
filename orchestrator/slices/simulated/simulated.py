"""Start a simulated multi-node Ray cluster on this machine, fast (Linux only).

The GCS and the raylets are started directly, not through `ray._private.node`, which starts every
node in turn and makes each wait for two Python agents that a local cluster has no use for.
Written against Ray 2.60: the command lines are those of `ray._private.services`.
"""

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.slices.simulated import reaper as reaper_script
from orchestrator.slices.simulated.raylet import (
    ENVIRONMENT,
    Host,
    Joining,
    flags_of,
    ray_file,
    raylet_command,
    tpu_host,
)
from orchestrator.slices.simulated.reaper import STOP_TIMEOUT_S, kill_groups
from orchestrator.slices.topology import Slice

HEAD = -1
START_TIMEOUT_S = 30.0
TEMP_DIR_LIMIT = 96  # a Unix socket's path has 107 bytes at most, 11 of them below temp_dir


@dataclass(frozen=True)
class Node:
    """A raylet, or the GCS: the leader of the process group that all processes of the node belong to."""

    node_id: str
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `nodes` holds the head and, by index, the hosts that live."""

    address: str
    cluster_id: str
    temp_dir: Path
    reaper: subprocess.Popen[bytes]
    gcs: Node
    nodes: dict[int, Node]
    dead_since: dict[int, float] = field(default_factory=dict)  # time.monotonic(), of hosts not yet replaced


def slice_hosts(kind: Slice, name: str) -> list[Host]:
    """Of one slice, in the order of their ids."""
    seen = {"TPU_NAME": name, "TPU_ACCELERATOR_TYPE": kind.name, "TPU_TOPOLOGY": kind.topology}
    # The checkout may not be installed; the hosts run what was launched.
    seen["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), *os.environ.get("PYTHONPATH", "").split()])
    return [
        tpu_host(name, worker, kind.name, kind.topology, seen | {"TPU_WORKER_ID": str(worker)})
        for worker in range(kind.hosts)
    ]


def repair(cluster: Cluster, hosts: Mapping[int, Host], after_s: float | None) -> None:
    """Replaces hosts that are dead for so long by new nodes of the same kind; None is never. Returns at once."""
    for index, host in hosts.items():
        if cluster.nodes[index].process.poll() is None:
            continue
        since = cluster.dead_since.setdefault(index, time.monotonic())
        if after_s is not None and time.monotonic() - since >= after_s:
            end_nodes(cluster, [index])
            start_node(cluster, index, host)


def end_node(cluster: Cluster, node_id: str) -> None:
    """Kill a host with all that runs on it, if it is there still."""
    for index, node in cluster.nodes.items():
        if node.node_id == node_id and index != HEAD:
            kill_groups({node.process.pid})


def end_nodes(cluster: Cluster, indices: Iterable[int]) -> None:
    """What ran on a host ends with it. Without effect where there is none."""
    ended = [cluster.nodes.pop(index) for index in indices if index in cluster.nodes]
    for index in indices:
        cluster.dead_since.pop(index, None)
    kill_groups({node.process.pid for node in ended})
    for node in ended:
        node.process.wait(STOP_TIMEOUT_S)


def start(hosts: Mapping[int, Host], temp_dir: Path) -> Cluster:
    """Start a head without CPUs and one node per host, by index from 0, and return once all have registered.

    `temp_dir` must be absolute, short, and missing or empty; it is removed with the cluster, which
    ends at `stop` or with this process. Call `ray.shutdown` before `stop`.
    """
    if not temp_dir.is_absolute() or len(os.fsencode(temp_dir)) > TEMP_DIR_LIMIT:
        raise ValueError(f"not an absolute path of up to {TEMP_DIR_LIMIT} bytes: {temp_dir}")
    for name in ("session/logs", "session/runtime_resources"):
        (temp_dir / name).mkdir(parents=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    reaper = start_reaper(temp_dir)
    try:
        gcs = _start_gcs(temp_dir, reaper)
        # This import takes a third of a second, in which the GCS starts.
        from ray._common.usage.usage_lib import put_cluster_metadata

        port = temp_dir / "session" / f"gcs_server_port_{gcs.node_id}"

        def ready() -> bool:
            return port.exists() and port.read_text().strip() != ""

        _wait(ready, [gcs], deadline, f"the GCS to write {port}", temp_dir)
        address = f"{_ip(HEAD)}:{int(port.read_text())}"
        client = _gcs_client(address)
        put_cluster_metadata(client, ray_init_cluster=False)
        client.internal_kv_put(b"session_name", b"session", True, b"session")
        cluster = Cluster(address, client.cluster_id.hex(), temp_dir, reaper, gcs, {})
        for index, host in {HEAD: Host(0, {"node:__internal_head__": 1}), **hosts}.items():
            start_node(cluster, index, host)
        _wait_for_nodes(cluster, deadline)
    except BaseException:
        end(temp_dir, reaper)
        raise
    return cluster


def stop(cluster: Cluster) -> None:
    """Kill all processes of the cluster and remove its directory."""
    end(cluster.temp_dir, cluster.reaper)
    for node in (cluster.gcs, *cluster.nodes.values()):
        node.process.wait(STOP_TIMEOUT_S)


def start_reaper(temp_dir: Path) -> subprocess.Popen[bytes]:
    """Ends what `spawn` starts, and removes the directory, at `end` or when this process dies."""
    command = [sys.executable, "-I", "-S", reaper_script.__file__, str(os.getpid()), str(temp_dir)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def end(temp_dir: Path, reaper: subprocess.Popen[bytes]) -> None:
    """Kill what was spawned, and remove the directory."""
    try:
        reaper.communicate(timeout=2 * STOP_TIMEOUT_S)  # closes its standard input
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"waited in vain for the processes of {temp_dir} to end") from None
    if reaper.returncode != 0:
        raise RuntimeError(f"could not end the cluster in {temp_dir}: {reaper.returncode}")


def _ip(index: int) -> str:
    """A loopback address per node, but not 127.0.0.1, which Ray replaces by the outward one."""
    return f"127.0.0.{index + 3}"


def _tell(reaper: subprocess.Popen[bytes], group: int) -> None:
    assert reaper.stdin is not None
    reaper.stdin.write(f"{group}\n".encode())
    reaper.stdin.flush()


def spawn(
    reaper: subprocess.Popen[bytes], log: Path, env: Mapping[str, str], command: list[str]
) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own: out of reach of Ctrl-C, but not of the reaper.

    Not in a session of its own: Linux schedules sessions against one another (autogroup), and hosts that wait for
    each other in every collective then run at 0.74 of the speed, measured on two cores.
    """
    env = {**os.environ, **ENVIRONMENT, **env}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    _tell(reaper, process.pid)
    return process


def _start_gcs(temp_dir: Path, reaper: subprocess.Popen[bytes]) -> Node:
    node_id, session = secrets.token_hex(28), temp_dir / "session"
    spilling = {"type": "filesystem", "params": {"directory_path": str(session)}}
    config = {"is_external_storage_type_fs": True, "object_spilling_config": json.dumps(spilling)}
    flags = {
        "config_list": base64.b64encode(json.dumps(config).encode()).decode(),
        "log_dir": session / "logs",
        "node_id": node_id,
        "node_ip_address": _ip(HEAD),
        "session_dir": session,
        "session_name": "session",
    }
    command = [ray_file("core/src/ray/gcs/gcs_server"), *flags_of(flags)]
    return Node(node_id, spawn(reaper, session / "logs/gcs.log", {}, command))


def start_node(cluster: Cluster, index: int, host: Host) -> None:
    """Returns at once: the node registers by itself."""
    node_id = cluster.gcs.node_id if index == HEAD else secrets.token_hex(28)
    session = cluster.temp_dir / "session"
    node = Joining(cluster.address, cluster.cluster_id, "session", node_id, _ip(index), session)
    log = session / f"logs/raylet-{node_id[:8]}.log"
    command = raylet_command(node, host, index == HEAD)
    cluster.nodes[index] = Node(node_id, spawn(cluster.reaper, log, host.env, command))


def _wait(ready: Callable[[], bool], nodes: Sequence[Node], deadline: float, what: str, temp_dir: Path) -> None:
    """Wait until `ready`; fail if the deadline passes first, or one of the nodes ends."""
    while not ready():
        ended = any(node.process.poll() is not None for node in nodes)
        if ended or time.monotonic() > deadline:
            # The logs are about to be removed.
            logs = (temp_dir / "session/logs").glob("*.log")
            tails = "".join(f"\n{log.name}: {log.read_text()[-1000:]}" for log in logs)
            why = "a Ray process ended" if ended else "time ran out"
            raise RuntimeError(f"{why} while waiting for {what}{tails}")
        time.sleep(0.005)


def _wait_for_nodes(cluster: Cluster, deadline: float) -> None:
    client, nodes = _gcs_client(cluster.address), cluster.nodes.values()
    wanted = {node.node_id for node in nodes}

    def ready() -> bool:
        return wanted <= {i.hex() for i in client.get_all_node_info(timeout=5)}

    what = f"{len(wanted)} nodes to register with the GCS"
    _wait(ready, [cluster.gcs, *nodes], deadline, what, cluster.temp_dir)


def _gcs_client(address: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=address)
