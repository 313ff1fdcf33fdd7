"""cluster=gke: slices as a RayCluster that KubeRay keeps, asked for by Kubernetes' own client."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import urllib3
import yaml
from kubernetes import client
from kubernetes import config as credentials

from gemma.config import ConfigError
from orchestrator.cluster import Cluster, Gke
from orchestrator.config import Config
from orchestrator.interrupt import StoppedError
from orchestrator.slices import existing, guest
from orchestrator.slices.given import Given, avoided
from orchestrator.slices.raycluster import OURS, raycluster, told
from orchestrator.slices.upkeep import Provider, RefusedError, Upkeep, kept
from orchestrator.slices.wanted import Ask, Request, Wanted, owner_label
from orchestrator.topology import slice_type

CALL_TIMEOUT_S = 30.0
PAGE = 500
KIND = {"group": "ray.io", "version": "v1", "plural": "rayclusters"}
FOREVER_S = float("inf")  # there is no other place to ask


class Api:
    """A client, and how many calls it has made."""

    def __init__(self, core: client.CoreV1Api, objects: client.CustomObjectsApi, namespace: str):
        self.core, self.objects, self.namespace = core, objects, namespace
        self.calls = 0

    def call(self, verb: Callable[..., Any], **given: Any) -> Any:
        """Raises RefusedError."""
        self.calls += 1
        try:
            return verb(namespace=self.namespace, _request_timeout=CALL_TIMEOUT_S, **given)
        except client.ApiException as error:
            raise refusal(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise RefusedError("trouble", f"{type(error).__name__}: {error}") from error


def api(gke: Gke) -> Api:
    """Raises ConfigError where there are no credentials."""
    made = client.Configuration()
    try:
        if gke.kubeconfig is None and gke.context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            credentials.load_incluster_config(client_configuration=made)
        else:
            credentials.load_kube_config(gke.kubeconfig, gke.context, client_configuration=made)
    except (credentials.ConfigException, OSError, ValueError) as error:
        raise ConfigError(
            f"cluster=gke cluster.gke.kubeconfig={gke.kubeconfig or 'null'} cluster.gke.context="
            f"{gke.context or 'null'}: no credentials; allowed: gcloud container clusters get-credentials CLUSTER"
            f" ({' '.join(str(error).split())})"
        ) from error
    made.retries = False  # the next look is the retry
    using = client.ApiClient(made)
    return Api(client.CoreV1Api(using), client.CustomObjectsApi(using), gke.namespace)


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
        message += "; is the Ray operator of GKE, or KubeRay, on this cluster?"
    return RefusedError("forbidden", f"{error.status} {error.reason}: {message}")


def objects(api: Api) -> list[dict[str, Any]]:
    """All RayClusters of this software, whosever they are."""
    found, token = [], ""
    while True:
        page = api.call(
            api.objects.list_namespaced_custom_object, **KIND, label_selector=OURS, limit=PAGE, _continue=token
        )
        found += page["items"]
        if not (token := page["metadata"].get("continue", "")):
            return found


def look(api: Api) -> list[Request]:
    """Raises RefusedError."""
    made = objects(api)
    waits: dict[str, str] = {}
    if any((one.get("status") or {}).get("state") != "ready" for one in made):
        pods = api.call(
            api.core.list_namespaced_pod, label_selector=f"{OURS},ray.io/cluster", field_selector="status.phase=Pending"
        )
        for pod in pods.items:
            for condition in pod.status.conditions or ():
                if condition.type == "PodScheduled" and condition.status == "False" and condition.message:
                    waits[pod.metadata.labels["ray.io/cluster"]] = condition.message
    return [told(one, waits.get(one["metadata"]["name"], ""), created(one)) for one in made]


def created(found: dict[str, Any]) -> float:
    stamp = found["metadata"].get("creationTimestamp")
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp() if stamp else time.time()


def give_back(api: Api, request: Request) -> None:
    """Returns once that is under way; the pods end before the object does."""
    try:
        api.call(
            api.objects.delete_namespaced_custom_object, **KIND, name=request.name, propagation_policy="Foreground"
        )
    except RefusedError as refused:
        if getattr(refused.__cause__, "status", None) != 404:  # gone meanwhile
            raise


def opened(config: Config, owner: str, joined: Callable[[], set[str]] | None = None) -> Provider:
    """What an owner may ask of it. Raises ConfigError where there are no credentials."""
    cluster, gke = config.cluster, section(config)
    using = api(gke)

    def ask(asked: Ask) -> None:
        body = raycluster(cluster, gke, owner, asked.name)
        using.call(using.objects.create_namespaced_custom_object, **KIND, body=body)

    def look_here() -> Sequence[Request]:
        return look(using)

    # KubeRay replaces hosts that do not come: what it has made is not given back for that.
    everything = joined or (lambda: {request.name for request in look(using)})
    return Provider(look_here, ask, partial(give_back, using), everything, "gke")


def section(config: Config) -> Gke:
    assert config.cluster.gke is not None
    return config.cluster.gke


def upkeep(config: Config, owner: str, joined: Callable[[], set[str]] | None = None) -> Upkeep:
    gke = section(config)
    return Upkeep(wanted(config.cluster, gke, owner), opened(config, owner, joined), gke.poll_s, FOREVER_S)


def wanted(cluster: Cluster, gke: Gke, owner: str) -> Wanted:
    kind = slice_type(cluster.slice, cluster.topology)
    return Wanted(owner, kind.name, kind.topology, 1, (gke.namespace,), FOREVER_S, cluster.num_slices)


def rendered(config: Config, owner: str) -> str:
    """The object as it would be asked for, as YAML that kubectl takes."""
    asked = raycluster(config.cluster, section(config), owner, f"gemma-{owner_label(owner)}")
    return yaml.safe_dump(json.loads(json.dumps(asked)), sort_keys=False).rstrip()  # nothing in it by reference


@contextmanager
def connect(config: Config, tell: Callable[[str, str], None], asked: Callable[[], bool]) -> Iterator[Given]:
    """A RayCluster that is to be kept is not given back at the end."""
    cluster = config.cluster
    assert config.run.id is not None
    owner = cluster.name or config.run.id
    keeping = upkeep(config, owner, set)
    with kept(keeping, cluster.keep or cluster.name is not None, tell) as given:
        at = wait_for_head(config, owner, given.repair, asked)
        with guest.joined(at) as ip, existing.connected(at, existing.code(), ip):
            yield replace(given, discard=avoided)


def wait_for_head(config: Config, owner: str, check: Callable[[], None], asked: Callable[[], bool]) -> str:
    """Its address, once its pod is up. Raises StoppedError, TimeoutError."""
    using, deadline = api(section(config)), time.monotonic() + config.timeout.reserve_s
    looked_at = 0.0
    while True:
        check()
        if asked():
            raise StoppedError("the Ray head")
        if time.monotonic() - looked_at > section(config).poll_s:
            looked_at = time.monotonic()
            if at := head_of(using, owner):
                return at
        if looked_at > deadline:
            raise TimeoutError(f"no Ray head within timeout.reserve_s={config.timeout.reserve_s:.0f}")
        time.sleep(0.05)


def head_of(using: Api, owner: str) -> str | None:
    try:
        mine = [one for one in objects(using) if told(one, "", 0.0).owner == owner]
    except RefusedError:
        return None  # told by the upkeep
    for one in mine:
        status = one.get("status") or {}
        ip = (status.get("head") or {}).get("podIP")
        if ip and not one["metadata"].get("deletionTimestamp"):
            return f"{ip}:6379"
    return None
