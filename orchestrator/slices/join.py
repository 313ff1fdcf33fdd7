"""A TPU host's part in the Ray cluster: run by its start-up script, with the code that the head gave it."""

import hashlib
import io
import os
import secrets
import tarfile
from pathlib import Path
from typing import Any

from orchestrator.record import secrets as secret_files
from orchestrator.slices.environment import inherited
from orchestrator.slices.simulated.raylet import ENVIRONMENT, Host, Joining, raylet_command, tpu_host

CODE = ("gemma", "orchestrator")  # the hosts run the code that was launched, not what lies there
KEY, SPACE = b"code", b"gemma-orchestrator"  # where the head's key-value store has it
FORGET_S = 10  # after so long without its head a node ends, and its host joins again


TOP = Path(__file__).parents[2]


def files() -> list[str]:
    """The code of this process, below TOP."""
    found = sorted(file.relative_to(TOP).as_posix() for name in CODE for file in (TOP / name).rglob("*.py"))
    return [name for name in found if not secret_files.why_left_out(TOP, name)]


def packed() -> bytes:
    """The code of this process, as a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in files():
            tar.add(TOP / name, name)
    return out.getvalue()


def laid_out(folder: Path) -> Path:
    """The same as files below a folder: a copy, as what lies here may change. Its path; the same code has the same."""
    content = {name: (TOP / name).read_bytes() for name in files()}
    told = hashlib.sha256(b"".join(name.encode() + code for name, code in content.items()))
    at = folder / told.hexdigest()[:12]
    if not at.exists():
        partial = folder / f".{at.name}.partial-{os.getpid()}"
        for name, code in content.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(code)
        partial.rename(at)
    return at


def main(client: Any, head: str, folder: str, ip: str) -> None:
    """Becomes the node. client: of Ray's GCS. folder: the host's own, which holds the code."""
    host = described(dict(os.environ), folder)
    name = client.internal_kv_get(b"session_name", b"session", timeout=10).decode()
    node = Joining(head, client.cluster_id.hex(), name, secrets.token_hex(28), ip, Path(folder) / "session")
    for below in ("logs", "runtime_resources"):
        (node.session / below).mkdir(parents=True)
    command = raylet_command(node, host)
    os.umask(0o077)
    os.execve(command[0], command, {**inherited(os.environ), **ENVIRONMENT, **host.env})


def described(environment: dict[str, str], folder: str) -> Host:
    name, worker, kind = (environment[key] for key in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"))
    env = {"PYTHONPATH": folder, "RAY_gcs_rpc_server_reconnect_timeout_s": str(FORGET_S)}
    return tpu_host(name, int(worker), kind, environment["TPU_TOPOLOGY"], env)
