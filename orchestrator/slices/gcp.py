"""cluster=gcp: slices of Google's Cloud TPU API, a queued resource each.

Source: cloud.google.com/tpu/docs/queued-resources and the messages of google.cloud.tpu_v2alpha1.
"""

import time
from collections.abc import Sequence
from typing import Any, cast

import grpc
from google.api_core import exceptions
from google.auth import default as default_credentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import tpu_v2alpha1 as tpu
from google.cloud.tpu_v2alpha1.services.tpu.transports import TpuGrpcTransport

from gemma.config import ConfigError
from orchestrator.slices.cluster import Cluster, Gcp
from orchestrator.slices.topology import TOPOLOGIES, slice_type
from orchestrator.slices.upkeep import RefusedError
from orchestrator.slices.wanted import Create, Request, State, owner_label

CALL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 3.0
SETTLE_S = 5.0  # for a request to be taken or refused
OURS, OWNER = (
    "gemma-orchestrator",
    "gemma-owner",
)  # labels of the nodes; the second is in their metadata too, unabridged
TOKEN = "gemma-token"  # in the metadata: of the Ray cluster that the hosts join
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
States = tpu.QueuedResourceState.State
STATES = {
    States.ACTIVE: State.READY,
    States.FAILED: State.LOST,
    States.SUSPENDING: State.GOING,  # its hosts may be saving; it is given back once it is suspended
    States.SUSPENDED: State.LOST,
    States.DELETING: State.GOING,
}
TROUBLE = (
    exceptions.ServerError,  # 500, unavailable, deadline exceeded
    exceptions.RetryError,
    exceptions.Aborted,
    exceptions.Cancelled,
    exceptions.Conflict,
    ConnectionError,
)


class Api:
    """A client, and how many calls it has made: what a project may ask in a minute is limited."""

    def __init__(self, client: tpu.TpuClient, project: str):
        self.client, self.project = client, project
        self.calls = 0

    def call(self, verb: str, request: Any) -> Any:
        """Raises RefusedError."""
        self.calls += 1
        try:
            return getattr(self.client, verb)(request=request, timeout=CALL_TIMEOUT_S, retry=None)
        except (exceptions.GoogleAPICallError, exceptions.RetryError, GoogleAuthError, ConnectionError) as error:
            raise refusal(error) from error


def api(gcp: Gcp) -> Api:
    """Raises ConfigError where there are no credentials, or no project."""
    if gcp.endpoint is not None:
        channel = grpc.insecure_channel(gcp.endpoint, options=[("grpc.enable_http_proxy", 0)])
        client = tpu.TpuClient(transport=TpuGrpcTransport(host=gcp.endpoint, channel=channel))
        return reached(Api(client, gcp.project or "emulated"))
    try:
        credentials, project = default_credentials(scopes=[SCOPE])
    except GoogleAuthError as error:
        raise ConfigError(
            "cluster=gcp: no credentials; allowed: gcloud auth application-default login, or"
            f" GOOGLE_APPLICATION_CREDENTIALS=FILE ({str(error).splitlines()[0]})"
        ) from error
    if not (named := gcp.project or project):
        raise ConfigError("cluster.gcp.project: missing; the credentials name none")
    return reached(Api(tpu.TpuClient(credentials=credentials), named))


def reached(api: Api) -> Api:
    """Raises ConfigError where nothing answers: its calls would be repeated for long."""
    try:
        channel = cast(TpuGrpcTransport, api.client.transport).grpc_channel
        grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
    except grpc.FutureTimeoutError:
        at = api.client.transport.host
        raise ConfigError(f"cluster=gcp: the Cloud TPU API at {at} does not answer") from None
    return api


def refusal(error: Exception) -> RefusedError:
    """What an error of the client means."""
    message = " ".join(str(getattr(error, "message", "") or error).split())
    if isinstance(error, TROUBLE) and not isinstance(error, exceptions.MethodNotImplemented):  # not this API
        return RefusedError("trouble", f"{type(error).__name__}: {message}")
    if isinstance(error, exceptions.TooManyRequests | exceptions.FailedPrecondition):  # RESOURCE_EXHAUSTED is the first
        return RefusedError(shortage(message), message)
    return RefusedError("forbidden", f"{type(error).__name__}: {message}")


def shortage(message: str) -> Any:
    """Only the words tell quota from capacity: Google gives both the same codes."""
    said = message.lower()
    if "quota exceeded for quota metric" in said and "per minute" in said:
        return "trouble"  # of calls, not of chips
    if "quota" in said:
        return "quota"
    return "stock-out" if "capacity" in said or "stockout" in said or "resources" in said else "forbidden"


def list_requests(api: Api, zones: Sequence[str]) -> list[Request]:
    """Everybody's slices that this software has asked for. Raises RefusedError where a zone cannot be seen."""
    return [as_request(resource) for resource in list_resources(api, zones)]


def list_resources(api: Api, zones: Sequence[str] = ()) -> list[tpu.QueuedResource]:
    """Raises RefusedError where a zone cannot be seen."""
    found = list[tpu.QueuedResource]()
    parent = f"projects/{api.project}/locations/-"
    token = ""
    while True:
        asked = tpu.ListQueuedResourcesRequest(parent=parent, page_size=500, page_token=token)
        page = next(iter(api.call("list_queued_resources", asked).pages))
        unseen = {name.rpartition("/")[2] for name in page.unreachable} & set(zones)
        if unseen:
            raise RefusedError("trouble", f"cannot be seen now: {', '.join(sorted(unseen))}")
        found += [resource for resource in page.queued_resources if is_ours(resource)]
        token = page.next_page_token
        if not token:
            return found


def is_ours(resource: tpu.QueuedResource) -> bool:
    return any(OURS in spec.node.labels for spec in resource.tpu.node_spec)


def as_request(resource: tpu.QueuedResource) -> Request:
    node = resource.tpu.node_spec[0].node
    _, _, _, zone, _, name = resource.name.split("/")
    state = STATES.get(resource.state.state, State.WAITING)
    why = ""
    if state is State.LOST:
        said = resource.state.failed_data.error.message or "preempted, or taken back by its owner"
        why = f"{resource.state.state.name.lower()}: {said}"
    return Request(
        name=name,
        zone=zone,
        owner=node.metadata.get(OWNER) or node.labels.get(OWNER, ""),
        state=state,
        slice=node.metadata.get("gemma-slice-type", node.accelerator_type),
        topology=node.metadata.get("gemma-topology", ""),
        since=resource.create_time.timestamp() if resource.create_time else time.time(),
        why=why,
        found=resource.state.state is States.PROVISIONING,
        capacity="spot" if "spot" in resource else "reserved" if resource.reservation_name else "on-demand",
    )


def token_of(api: Api, owner: str) -> str | None:
    """The token with which an owner's slices join its Ray head; None where it has none yet, or nothing answers."""
    try:
        found = list_resources(api)
    except RefusedError:
        return None  # told by the upkeep
    metadata = [dict(resource.tpu.node_spec[0].node.metadata) for resource in found]
    return next((one[TOKEN] for one in metadata if one.get(OWNER) == owner and one.get(TOKEN)), None)


def queued_resource(
    cluster: Cluster, owner: str, ask: Create, project: str, script: str, head_at: str, token: str | None
) -> Any:
    """One slice as the API is to be asked for it."""
    gcp = cluster.gcp
    assert gcp is not None
    kind = slice_type(cluster.slice, cluster.topology)
    parent = f"projects/{project}/locations/{ask.zone}"
    usual = "x".join(map(str, TOPOLOGIES[cluster.slice])) == kind.topology
    node = tpu.Node(
        runtime_version=gcp.runtime,
        network_config=tpu.NetworkConfig(
            network=gcp.network or "", subnetwork=gcp.subnetwork or "", enable_external_ips=gcp.external_ips
        ),
        labels={OURS: "1", OWNER: owner_label(owner)},
        metadata={
            "startup-script": script,
            OWNER: owner,
            "gemma-slice": ask.name,
            "gemma-slice-type": kind.name,
            "gemma-topology": kind.topology,
            "gemma-head": head_at,
            **({TOKEN: token} if token else {}),
        },
    )
    if usual:
        node.accelerator_type = kind.name
    else:
        node.accelerator_config = tpu.AcceleratorConfig(type_="V5P", topology=kind.topology)
    if gcp.service_account:
        node.service_account = tpu.ServiceAccount(email=gcp.service_account, scope=[SCOPE])
    if gcp.disk:
        node.data_disks = [tpu.AttachedDisk(source_disk=gcp.disk, mode="READ_ONLY")]
    wanted = tpu.QueuedResource(
        tpu={"node_spec": [{"parent": parent, "node_id": ask.name, "node": node}]},
        queueing_policy={"valid_until_duration": {"seconds": int(gcp.valid_hours * 3600)}},
    )
    if cluster.capacity == "spot":
        wanted.spot = tpu.QueuedResource.Spot()
    elif cluster.capacity == "reserved":
        wanted.guaranteed = tpu.QueuedResource.Guaranteed(reserved=True)
        wanted.reservation_name = gcp.reservation or ""
    return tpu.CreateQueuedResourceRequest(parent=parent, queued_resource_id=ask.name, queued_resource=wanted)


def create(api: Api, request: tpu.CreateQueuedResourceRequest) -> None:
    """Returns once the request is in the queue, or as good as. Raises RefusedError."""
    operation = api.call("create_queued_resource", request)
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        api.calls += 1
        try:
            if operation.done(retry=None):
                operation.result(timeout=CALL_TIMEOUT_S)
                return
        except (exceptions.GoogleAPICallError, exceptions.RetryError) as error:
            raise refusal(error) from error
        time.sleep(0.5)


def delete(api: Api, request: Request) -> None:
    """Returns once that is under way. The nodes end with the request."""
    name = f"projects/{api.project}/locations/{request.zone}/queuedResources/{request.name}"
    try:
        api.call("delete_queued_resource", tpu.DeleteQueuedResourceRequest(name=name, force=True))
    except RefusedError as refused:
        if not isinstance(refused.__cause__, exceptions.NotFound):  # gone meanwhile
            raise
