"""A place of this process in a Ray cluster whose head is elsewhere: a node without resources, from which it drives."""

import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.slices import join
from orchestrator.slices.simulated import simulated
from orchestrator.slices.simulated.raylet import Host, Joining, raylet_command

JOIN_TIMEOUT_S = 60.0


@contextmanager
def joined(address: str) -> Iterator[str]:
    """The IP under which the other nodes know this one."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    ip = own_ip(address)
    client = GcsClient(address=address)
    folder = Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp"))
    reaper = simulated.start_reaper(folder)
    try:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not (name := client.internal_kv_get(b"session_name", b"session", timeout=JOIN_TIMEOUT_S)):
            _wait(deadline, f"the Ray head at {address} to be up")
        session = folder / name.decode()
        node = Joining(address, client.cluster_id.hex(), name.decode(), secrets.token_hex(28), ip, session)
        for below in ("logs", "runtime_resources"):
            (session / below).mkdir(parents=True)
        log = folder / "raylet.log"
        process = simulated.spawn(reaper, log, {}, raylet_command(node, Host(cpus=0)))
        while node.node_id not in {found.hex() for found in client.get_all_node_info(timeout=JOIN_TIMEOUT_S)}:
            if process.poll() is not None:
                raise RuntimeError(f"no node of the Ray cluster came up here: {log.read_text()[-2000:]}")
            _wait(deadline, f"a node here to join the Ray cluster at {address}")
        yield ip
    finally:
        simulated.end(folder, reaper)


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"waited {JOIN_TIMEOUT_S:.0f} s for {what}")
    time.sleep(0.05)


def job(folder: Path) -> Any:
    """Of Ray: its processes run the code of this one, from a folder that all hosts see. It needs none of Ray's agents,
    so that processes which stand by can be used.
    """
    from ray.job_config import JobConfig

    made = JobConfig(_py_driver_sys_path=[str(join.laid_out(folder.absolute()))])
    made._get_proto_job_config()  # fixed by this: Ray would have the directory come first that this process is in
    return made


def own_ip(address: str) -> str:
    """Under which a head reaches this machine. Raises OSError where it does not answer."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5.0) as probe:
        ip = str(probe.getsockname()[0])
    return "127.0.1.2" if ip.startswith("127.") else ip  # Ray replaces 127.0.0.1 by the outward one
