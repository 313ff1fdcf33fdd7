"""Start a simulated multi-node Ray cluster on this machine, fast (Linux only).

The GCS and the raylets are started directly, not through `ray._private.node`, which starts every
node in turn and makes each wait for two Python agents that a local cluster has no use for.
Written against Ray 2.60: the command lines are those of `ray._private.services`.

Ray binds a port to loopback only where the node's address is exactly 127.0.0.1, and its Python part replaces that one
by the machine's outward address; hosts need an address each. So the ports are open, and a token of the cluster's own
guards them. The temporary folder is this user's alone: Ray makes what lies in it writable by all.
"""

import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.slices import auth
from orchestrator.slices.environment import inherited
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
from orchestrator.slices.simulated.reaper import STOP_TIMEOUT_S, kill_groups, members
from orchestrator.slices.topology import Slice

HEAD = -1
START_TIMEOUT_S = 30.0
TEMP_DIR_LIMIT = 92  # a Unix socket's path has 107 bytes at most, 15 of them below temp_dir
PRIVATE = 0o077  # umask: what Ray's processes make is this user's alone


@dataclass(frozen=True)
class Node:
    """A raylet, or the GCS: the leader of the process group that all processes of the node belong to."""

    node_id: str
    process: subprocess.Popen[bytes]


@dataclass
class Reaper:
    """What ends spawned processes when this one dies; as long as this one lives, it ends them itself."""

    temp_dir: Path
    process: subprocess.Popen[bytes]
    spawned: list[subprocess.Popen[bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `nodes` holds the head and, by index, the hosts that live."""

    address: str
    cluster_id: str
    temp_dir: Path
    reaper: Reaper
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
    ends at `stop` or with this process. Call `ray.shutdown` before `stop`. Whoever uses the cluster does so within
    `auth.using(token_path(temp_dir))`.
    """
    if not temp_dir.is_absolute() or len(os.fsencode(temp_dir)) > TEMP_DIR_LIMIT:
        raise ValueError(f"not an absolute path of up to {TEMP_DIR_LIMIT} bytes: {temp_dir}")
    temp_dir.mkdir(mode=0o700, exist_ok=True)
    temp_dir.chmod(0o700)
    session = session_dir(temp_dir)
    for name in ("logs", "runtime_resources"):
        (session / name).mkdir(parents=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    reaper = start_reaper(temp_dir)
    try:
        gcs = _start_gcs(temp_dir, reaper)
        # This import takes a third of a second, in which the GCS starts.
        from ray._common.usage.usage_lib import put_cluster_metadata

        port = session / f"gcs_server_port_{gcs.node_id}"

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


def lost_head(cluster: Cluster) -> str:
    """What has ended of the head, and so the cluster with it; empty where nothing has."""
    parts = {"GCS": cluster.gcs, "raylet": cluster.nodes[HEAD]}
    gone = [f"its {name} (pid {n.process.pid}) ended" for name, n in parts.items() if n.process.poll() is not None]
    return "; ".join(gone)


def session_dir(temp_dir: Path) -> Path:
    """Ray makes its temporary folder, and some below it, writable by all: they lie in one that is this user's alone."""
    return temp_dir / "ray" / "session"


def token_path(temp_dir: Path) -> Path:
    return temp_dir / auth.FILE


def start_reaper(temp_dir: Path) -> Reaper:
    """Ends what `spawn` starts, and removes the directory, when this process dies."""
    return Reaper(temp_dir, _reaper_process(temp_dir))


def _reaper_process(temp_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", reaper_script.__file__, str(os.getpid()), str(temp_dir)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def end(temp_dir: Path, reaper: Reaper) -> None:
    """Kill what was spawned, whether the reaper lives or not, and remove the directory."""
    kill_groups({process.pid for process in reaper.spawned})
    for process in reaper.spawned:
        process.wait(STOP_TIMEOUT_S)
    try:
        reaper.process.communicate(timeout=2 * STOP_TIMEOUT_S)  # closes its standard input
    except subprocess.TimeoutExpired:
        reaper.process.kill()
        reaper.process.wait()
    shutil.rmtree(temp_dir, ignore_errors=True)
    if temp_dir.exists():
        raise RuntimeError(f"could not remove {temp_dir}")


def _ip(index: int) -> str:
    """A loopback address per node, but not 127.0.0.1, which Ray replaces by the outward one."""
    return f"127.0.0.{index + 3}"


def _register(reaper: Reaper, spawned: Sequence[subprocess.Popen[bytes]]) -> None:
    assert reaper.process.stdin is not None
    reaper.process.stdin.write("".join(f"{process.pid}\n" for process in spawned).encode())
    reaper.process.stdin.flush()


def spawn(reaper: Reaper, log: Path, env: Mapping[str, str], command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own: out of reach of Ctrl-C, but not of the reaper. Of the environment it
    inherits what `environment.inherited` lists.

    Not in a session of its own: Linux schedules sessions against one another (autogroup), and hosts that wait for
    each other in every collective then run at 0.74 of the speed, measured on two cores.
    """
    env = {**inherited(os.environ), **ENVIRONMENT, **env}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            umask=PRIVATE,
        )
    reaper.spawned = [one for one in reaper.spawned if one.returncode is None or members({one.pid})]
    reaper.spawned.append(process)
    try:
        _register(reaper, [process])
    except OSError:  # somebody has killed it: another one takes its place
        reaper.process.wait(STOP_TIMEOUT_S)
        reaper.process = _reaper_process(reaper.temp_dir)
        _register(reaper, reaper.spawned)
    return process


def _start_gcs(temp_dir: Path, reaper: Reaper) -> Node:
    node_id, session = secrets.token_hex(28), session_dir(temp_dir)
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
    session = session_dir(cluster.temp_dir)
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
            logs = (session_dir(temp_dir) / "logs").glob("*.log")
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
