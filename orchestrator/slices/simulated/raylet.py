"""A node of a Ray cluster as one process, the raylet: the command that starts it, without Ray's Python agents.

Written against Ray 2.60: the command line is that of `ray._private.services`.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.slices.topology import CHIPS_PER_HOST, NAME_LABEL, RANK_LABEL, TYPE_LABEL

OBJECT_STORE_BYTES = 80 << 20
MEMORY_BYTES = 4 << 30
UNUSED_PORT = 1024  # the lowest that Ray takes: nothing listens there
# Metrics would need the agents. A killed host is to be noticed within seconds: its refused
# connection fails a health check at once, while a slow host still gets each check's full timeout.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    # A host's processes stay in the group that ends with it: one that escaped while it was starting would make its
    # directories again after they were removed.
    "RAY_process_group_cleanup_enabled": "0",
    "RAY_worker_niceness": "0",  # by default hosts would yield to everything else on this machine
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_raylet_client_connect_timeout_milliseconds": "20",
    "RAY_raylet_client_num_connect_attempts": "500",
}


@dataclass(frozen=True)
class Host:
    """What one simulated host offers, and the variables its processes see."""

    cpus: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def tpu_host(name: str, worker: int, kind: str, topology: str, env: Mapping[str, str]) -> Host:
    """What the node of a slice's host says of itself: as real TPU nodes do."""
    resources = {"TPU": float(CHIPS_PER_HOST), name: 1.0, "accelerator_type:TPU-V5P": 1.0}
    if worker == 0:
        resources[f"TPU-{kind}-head"] = 1.0
    labels = {
        NAME_LABEL: name,
        RANK_LABEL: str(worker),
        TYPE_LABEL: kind,
        "ray.io/tpu-topology": topology,
        "ray.io/accelerator-type": "TPU-V5P",
    }
    return Host(cpus=1, resources=resources, labels=labels, env=env)


@dataclass(frozen=True)
class Joining:
    """Where a node comes from and goes to."""

    address: str  # of the GCS
    cluster_id: str
    session_name: str
    node_id: str
    ip: str
    session: Path  # the node's own directory of the session, with logs/ and runtime_resources/


def raylet_command(node: Joining, host: Host, head: bool = False) -> list[str]:
    """Of a node without Ray's agents: nothing here uses them, and the node is up in a third of a second."""
    session, temp_dir = node.session, node.session.parent
    resources = {"CPU": host.cpus, f"node:{node.ip}": 1, **host.resources}
    resources |= {"memory": MEMORY_BYTES, "object_store_memory": OBJECT_STORE_BYTES}
    shared = {
        "node-ip-address": node.ip,
        "gcs-address": node.address,
        "cluster-id": node.cluster_id,
        "session-name": node.session_name,
        "temp-dir": temp_dir,
        "metrics-agent-port": -1,
        "runtime-env-agent-port": UNUSED_PORT,
    }
    worker = shared | {
        "node-manager-port": "RAY_NODE_MANAGER_PORT_PLACEHOLDER",
        "object-store-name": temp_dir / f"s-{node.node_id[:8]}",
        "raylet-name": temp_dir / f"r-{node.node_id[:8]}",
        "redis-address": None,
        "webui": None,
    }
    worker_command = [
        sys.executable,
        ray_file("_private/workers/setup_worker.py"),
        ray_file("_private/workers/default_worker.py"),
        *flags_of(worker),
        "RAY_WORKER_DYNAMIC_OPTION_PLACEHOLDER",
    ]
    # The raylet insists on agents and ends with them, but waits for them only if a port is 0.
    idle_agent = 'sh -c "exec sleep infinity"'
    flags = shared | {
        "head": str(head).lower(),
        "node_id": node.node_id,
        "raylet_socket_name": worker["raylet-name"],
        "store_socket_name": worker["object-store-name"],
        "object_manager_port": 0,
        "node_manager_port": 0,
        "dashboard_agent_listen_port": UNUSED_PORT,
        "dashboard_agent_command": idle_agent,
        "runtime_env_agent_command": idle_agent,
        "python_worker_command": subprocess.list2cmdline(worker_command),
        "num_prestart_python_workers": host.cpus,
        "maximum_startup_concurrency": max(1, host.cpus),
        "static_resource_list": ",".join(f"{k},{v}" for k, v in resources.items() if v),
        "labels": json.dumps(dict(host.labels)),
        "object_store_memory": OBJECT_STORE_BYTES,
        "session_dir": session,
        "log_dir": session / "logs",
        "resource_dir": session / "runtime_resources",
        "fallback_directory": session,
    }
    return [ray_file("core/src/ray/raylet/raylet"), *flags_of(flags)]


def flags_of(flags: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def ray_file(name: str) -> str:
    spec = importlib.util.find_spec("ray")  # does not import it
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / name)
