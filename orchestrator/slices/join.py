"""A TPU host's part in the Ray cluster: run by its start-up script, with the code that the head gave it."""

import io
import os
import secrets
import tarfile
from pathlib import Path
from typing import Any

from orchestrator.slices.raylet import ENVIRONMENT, Host, Joining, raylet_command, tpu_host

CODE = ("gemma", "orchestrator")  # the hosts run the code that was launched, not what lies there
KEY, SPACE = b"code", b"gemma-orchestrator"  # where the head's key-value store has it
FORGET_S = 10  # after so long without its head a node ends, and its host joins anew


def packed() -> bytes:
    """The code of this process, as a tar."""
    top, out = Path(__file__).parents[2], io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for file in sorted(file for name in CODE for file in (top / name).rglob("*.py")):
            tar.add(file, file.relative_to(top).as_posix())
    return out.getvalue()


def main(client: Any, head: str, folder: str, ip: str) -> None:
    """Becomes the node. client: of Ray's GCS. folder: the host's own, which holds the code."""
    host = described(dict(os.environ), folder)
    name = client.internal_kv_get(b"session_name", b"session", timeout=10).decode()
    node = Joining(head, client.cluster_id.hex(), name, secrets.token_hex(28), ip, Path(folder) / "session")
    for below in ("logs", "runtime_resources"):
        (node.session / below).mkdir(parents=True)
    command = raylet_command(node, host)
    os.execve(command[0], command, {**os.environ, **ENVIRONMENT, **host.env})


def described(environment: dict[str, str], folder: str) -> Host:
    name, worker, kind = (environment[key] for key in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"))
    env = {"PYTHONPATH": folder, "RAY_gcs_rpc_server_reconnect_timeout_s": str(FORGET_S)}
    return tpu_host(name, int(worker), kind, environment["TPU_TOPOLOGY"], env)
