"""RayClusters of a Kubernetes namespace, by Kubernetes' own client: create one, list them, delete one, replace a
host of one.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from kubernetes import client
from kubernetes import config as credentials
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from gemma.config import ConfigError
from orchestrator.slices.cluster import Gke
from orchestrator.slices.raycluster import CLUSTER, OURS, OWNER, as_request, condition, sentry, waits
from orchestrator.slices.upkeep import RefusedError
from orchestrator.slices.wanted import Request, State, owner_label

CALL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 3.0
NOWHERE = NewConnectionError, ConnectTimeoutError, SSLError
PAGE = 500
KIND = {"group": "ray.io", "version": "v1", "plural": "rayclusters"}
GCS_PORT = 6379
# A pod's label of its slice: KubeRay's from 1.6 on, before that the web hook's.
SLICES = "ray.io/worker-group-replica-name", "replicaIndex"


@dataclass(frozen=True)
class Api:
    core: client.CoreV1Api
    objects: client.CustomObjectsApi
    namespace: str


@dataclass(frozen=True)
class Head:
    """Of a RayCluster."""

    address: str  # empty as long as it has none
    ready: bool


def api(gke: Gke) -> Api:
    """Raises ConfigError where there are no credentials."""
    made = client.Configuration()
    try:
        if gke.kubeconfig is None and gke.context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            credentials.load_incluster_config(client_configuration=made)
        else:
            credentials.load_kube_config(gke.kubeconfig, gke.context, client_configuration=made)
    except Exception as error:  # of the client, of YAML, of files: whatever is in there
        raise ConfigError(
            f"cluster=gke cluster.gke.kubeconfig={gke.kubeconfig or 'null'} cluster.gke.context="
            f"{gke.context or 'null'}: no credentials; allowed: gcloud container clusters get-credentials CLUSTER"
            f" ({' '.join(str(error).split())})"
        ) from error
    made.retries = False  # the next look is the retry
    using = client.ApiClient(made)
    return Api(client.CoreV1Api(using), client.CustomObjectsApi(using), gke.namespace)


def check(gke: Gke) -> None:
    """Raises ConfigError where there are no credentials, or its API server or operator cannot be reached or used."""
    try:
        list_requests(api(gke))
    except RefusedError as refused:
        if refused.kind != "trouble":  # else it may pass
            raise ConfigError(f"cluster=gke: {refused}") from refused


def call(api: Api, verb: Callable[..., Any], **arguments: Any) -> Any:
    """Raises RefusedError."""
    try:
        return verb(namespace=api.namespace, _request_timeout=(CONNECT_TIMEOUT_S, CALL_TIMEOUT_S), **arguments)
    except client.ApiException as error:
        raise refusal(error) from error
    except (HTTPError, OSError) as error:
        where = api.core.api_client.configuration.host
        kind: Literal["unreachable", "trouble"] = "unreachable" if isinstance(error, NOWHERE) else "trouble"
        raise RefusedError(kind, f"{where} does not answer: {' '.join(str(error).split())}") from error


def refusal(error: client.ApiException) -> RefusedError:
    """What Kubernetes' answer means."""
    try:
        message = " ".join(json.loads(error.body or "")["message"].split())
    except (TypeError, ValueError, KeyError):
        message = str(error.reason)
    if error.status in (0, 408, 409, 429) or error.status >= 500:
        return RefusedError("trouble", f"{error.status}: {message}")
    if error.status == 403 and "exceeded quota" in message:
        return RefusedError("quota", message)
    if error.status == 404:
        message += "; is there a Ray operator on this cluster (GKE's add-on, or KubeRay), and the namespace?"
    return RefusedError("forbidden", f"{error.status} {error.reason}: {message}")


def create(api: Api, body: dict[str, Any]) -> None:
    call(api, api.objects.create_namespaced_custom_object, **KIND, body=body)


def objects(api: Api) -> list[dict[str, Any]]:
    """All RayClusters of this software, whosever they are."""
    found, token = [], ""
    while True:
        page = call(
            api, api.objects.list_namespaced_custom_object, **KIND, label_selector=OURS, limit=PAGE, _continue=token
        )
        found += page["items"]
        if not (token := page["metadata"].get("continue", "")):
            return found


def list_requests(api: Api) -> list[Request]:
    """Raises RefusedError."""
    made = objects(api)
    states = [as_request(one, "", 0.0).state for one in made]
    names = [one["metadata"]["name"] for one, state in zip(made, states, strict=True) if state is State.WAITING]
    reasons = why_pods_wait(api, names) if names else {}
    found = []
    for one in made:
        why, lasts = reasons.get(one["metadata"]["name"], ("", False))
        found.append(as_request(one, why, created(one), lasts))
    return found


def why_pods_wait(api: Api, names: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """By RayCluster, what one of its pods waits for, and whether that lasts."""
    pods = listed(api, api.core.list_namespaced_pod, label_selector=f"{OURS},{CLUSTER} in ({','.join(names)})")
    found: dict[str, tuple[str, bool]] = {}
    owners = {}
    for pod in pods:
        name = pod["metadata"]["labels"][CLUSTER]
        owners[pod["metadata"]["name"]] = name
        why = waits(pod)
        if why[0] and why[1] >= found.get(name, ("", False))[1]:  # what lasts comes first
            found[name] = why
    try:
        failed = listed(api, api.core.list_namespaced_event, field_selector="reason=FailedScaleUp")
    except RefusedError:
        return found  # may not be allowed, and would only say it better
    for event in failed:
        name = owners.get(event["involvedObject"].get("name"), "")
        if name and not found.get(name, ("", False))[1]:
            found[name] = (" ".join(str(event.get("message")).split()), False)
    return found


def listed(api: Api, verb: Callable[..., Any], **arguments: Any) -> list[dict[str, Any]]:
    """A page of them, as they came: one is as good as another, and thousands would take long."""
    page = call(api, verb, limit=PAGE, _preload_content=False, **arguments)
    return list(json.loads(page.data)["items"])


def every(api: Api, **arguments: Any) -> list[dict[str, Any]]:
    """All pods, page by page."""
    found, token = [], ""
    while True:
        verb = api.core.list_namespaced_pod
        page = json.loads(call(api, verb, limit=PAGE, _continue=token, _preload_content=False, **arguments).data)
        found += page["items"]
        if not (token := page["metadata"].get("continue") or ""):
            return found


def created(found: Mapping[str, Any]) -> float:
    stamp = found["metadata"].get("creationTimestamp")
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp() if stamp else time.time()


def head(api: Api, owner: str) -> Head:
    for one in objects(api):
        metadata, status = one["metadata"], one.get("status") or {}
        ip = (status.get("head") or {}).get("podIP")
        mine = (metadata.get("annotations") or {}).get(OWNER) == owner and not metadata.get("deletionTimestamp")
        if mine and ip:
            port = str((status.get("endpoints") or {}).get("gcs-server", ""))
            return Head(f"{ip}:{port if port.isdigit() else GCS_PORT}", bool(condition(status, "HeadPodReady")))
    return Head("", False)


def delete(api: Api, request: Request) -> None:
    """Returns once that is under way; the pods end before the object does."""
    verb = api.objects.delete_namespaced_custom_object
    try:
        call(api, verb, **KIND, name=request.name, propagation_policy="Foreground")
    except RefusedError as refused:
        if getattr(refused.__cause__, "status", None) != 404:  # gone meanwhile
            raise


def replace_host(api: Api, owner: str, ip: str) -> str:
    """Has KubeRay make the slice of the host with this address again, on other nodes. Says so once that is under way;
    nothing where no such host is there any more.
    """
    mine = f"{OURS},{OWNER}={owner_label(owner)},{CLUSTER}"
    there = [pod for pod in every(api, label_selector=mine, field_selector=f"status.podIP={ip}") if stays(pod)]
    if not there:
        return ""
    node, metadata = there[0]["spec"]["nodeName"], there[0]["metadata"]
    found = next((one for one in objects(api) if one["metadata"]["name"] == metadata["labels"][CLUSTER]), None)
    if found is None:
        return ""
    try:
        call(api, api.core.create_namespaced_pod, body=sentry(found, node))
    except RefusedError as refused:
        if getattr(refused.__cause__, "status", None) != 409:  # it stands there
            raise
    chosen = {"label_selector": mine, "field_selector": f"metadata.name={metadata['name']}"}
    if label := next((label for label in SLICES if label in metadata["labels"]), ""):
        cluster = f"{mine}={metadata['labels'][CLUSTER]}"
        chosen = {"label_selector": f"{cluster},{label}={metadata['labels'][label]}"}
    call(api, api.core.delete_collection_namespaced_pod, **chosen)
    return f"its slice is made again, and keeps off {node}"


def stays(pod: Mapping[str, Any]) -> bool:
    return pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
