"""The head of the Ray cluster that slices join: one on this machine, for as long as the run, or one that is there."""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma.config import ConfigError
from orchestrator.slices import auth, join
from orchestrator.slices.cluster import Cluster, Gcp
from orchestrator.slices.simulated import simulated

START_TIMEOUT_S = 60.0
# No flag of Ray's turns its client server off: it starts where what it needs is installed.
RAY_WITHOUT_CLIENT_SERVER = """
from ray.scripts import scripts
scripts.get_ray_client_dependency_error = lambda: "not wanted"
scripts.main()
"""
ANY = "10.255.255.255"  # no packet is sent there: the system is asked which way one would go


def check(cluster: Cluster, gcp: Gcp) -> None:
    """Raises ConfigError where another head is in the way."""
    at = address(cluster, gcp)
    if cluster.address is None and listens(at):
        raise ConfigError(
            f"cluster.gcp.port={gcp.port}: taken on {at}; another port, or cluster.address={at} if a Ray head is there"
            " for this run"
        )
    if cluster.address is not None and not listens(at):
        raise ConfigError(f"cluster.address={at}: nothing answers there")


@contextmanager
def running_head(cluster: Cluster, gcp: Gcp, token: str | None) -> Iterator[str]:
    """Its address. token: that one which is started here asks for; of one that is there, this process has it."""
    at = address(cluster, gcp)
    if cluster.address is not None:
        yield at
        return
    folder = Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp"))
    reaper = simulated.start_reaper(folder)
    try:
        with auth.using(auth.write_token(folder, token or auth.new_token())):
            start(at, folder, reaper)
            yield at
    finally:
        simulated.end(folder, reaper)


def address(cluster: Cluster, gcp: Gcp) -> str:
    """Where it is, or will be."""
    return cluster.address or f"{own_ip(gcp)}:{gcp.port}"


def own_ip(gcp: Gcp) -> str:
    """Under which other machines reach this one."""
    if gcp.endpoint is not None and gcp.endpoint.startswith("127."):
        return "127.0.1.1"  # the slices are processes here
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((ANY, 1))
        return str(probe.getsockname()[0])


def start(address: str, folder: Path, reaper: simulated.Reaper) -> None:
    """Returns once it answers. It ends with the reaper, and that with this process."""
    ip, _, port = address.rpartition(":")
    command = [sys.executable, "-c", RAY_WITHOUT_CLIENT_SERVER, "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={ip}", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    command += [f"--temp-dir={folder / 'ray'}"]
    log = folder / "head.log"
    env = {"RAY_enable_open_telemetry": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    head = simulated.spawn(reaper, log, env, command)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not listens(address):
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no Ray head came up at {address}: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def give_code(address: str) -> None:
    """The hosts that join from now on run the code of this process."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client = GcsClient(address=address)
    client.internal_kv_put(join.KEY, join.packed(), True, join.SPACE, timeout=START_TIMEOUT_S)


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True
