"""cluster=ray: TPU nodes of a Ray cluster that exists already."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.hosts.placement import whole_slices
from orchestrator.interrupt import handlers_kept
from orchestrator.slices.cluster import HOST_PORT
from orchestrator.slices.environment import bypass_proxy
from orchestrator.slices.join import CODE
from orchestrator.slices.lease import Lease, avoided

CONNECT_TIMEOUT_S = 3.0  # Ray itself would try for half a minute and more


@contextmanager
def connect(config: Config, *_: object) -> Iterator[Lease]:
    """Leaves the cluster as it was: only this run's actors and placement groups end."""
    with connected(str(config.cluster.address), code()):
        # Lost hosts are replaced by the cluster's owner, or its autoscaler.
        yield Lease(lambda: None, avoided, lambda: None)


def code() -> dict[str, Any]:
    """The hosts run the code of this process, where Ray's agents bring it to them."""
    return {"py_modules": [str(Path(__file__).parents[2] / name) for name in CODE]}


@contextmanager
def connected(
    address: str, runtime_env: dict[str, Any] | None = None, ip: str | None = None, job: JobConfig | None = None
) -> Iterator[None]:
    """To a Ray cluster, from its node of this IP; None is this machine's outward one. Raises ConfigError."""
    if re.fullmatch(HOST_PORT, address):
        bypass_proxy(address.rpartition(":")[0])
        if why := unanswered(address):
            raise ConfigError(f"cluster.address={address}: no Ray cluster answers there ({why})")
    try:
        with handlers_kept():
            ray.init(
                address=address,
                _node_ip_address=ip,
                runtime_env=runtime_env,
                job_config=job,  # type: ignore[arg-type]
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"cluster.address={address}: no Ray cluster answers there ({why})") from error
    try:
        yield
    finally:
        ray.shutdown()


def unanswered(address: str) -> str | None:
    """Why nothing at HOST:PORT is the head of a Ray cluster; None where something is, though it may refuse us."""
    import grpc
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return None  # the certificates are Ray's to read
    try:
        with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=CONNECT_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
            return " ".join(error.details().split())[-150:]
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"it takes the connection and says nothing for {CONNECT_TIMEOUT_S:.0f} s"
    return None


def joined(config: Config) -> set[str]:
    """The slices whose hosts are all there. None before this process is connected."""
    if not ray.is_initialized():
        return set()
    whole = whole_slices(ray.nodes(), config.cluster.slice, config.slice.hosts)
    return {spots[0].slice_name for spots in whole}


def is_alive(node_id: str) -> bool:
    """Whether a node is in the cluster, as far as Ray knows. None is before this process is connected."""
    return ray.is_initialized() and any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
