"""Kubernetes' API on loopback, as far as RayClusters and their pods go, with KubeRay behind it: spoken to by
Kubernetes' own client. The pods are processes here.

python -m tests.kuberay [provision_s=1] [free=SLICES] [quota=pods|objects] [denied=VERB] [missing=image|operator]
                        [trouble=0.2] [preempt_s=S] [notice_s=5] [hosts=true] [dashboard=false]

Prints the overrides with which launch.train uses it, and what it has been asked for as it goes. Ends with Ctrl-C.

free: there are nodes for so many slices, the pods of others wait. quota: there is none for their pods, or for
RayClusters. denied: one of create, list, delete, deletecollection is forbidden. missing: their image, or the
operator. trouble: this share of calls fails with 500s or is not answered, half of them after they were obeyed.
preempt_s: the first slice of the first RayCluster is taken away so long after it was there, notice_s after its hosts
were told; KubeRay makes it again. dashboard: the Ray heads have one.
"""

import json
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from orchestrator.slices.simulated import simulated
from tests import kube as kubes
from tests import pods
from tests.kube import Kube, Made, Settings

TICK_S = 0.02
VERBS = {"GET": "list", "POST": "create", "DELETE": "delete"}


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.answer = {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": status}


def obey(kube: Kube, method: str, parts: list[str], query: dict[str, str], body: Any) -> Any:
    """parts: of the path, from the kind on."""
    if parts[0] == "events":
        return {"metadata": {}, "items": events(kube)}
    if parts[0] == "pods":
        if method == "POST":
            if not kubes.create_pod(kube, body):
                raise Refused(409, "AlreadyExists", f'pods "{body["metadata"]["name"]}" already exists')
            return body
        found = kubes.select(kubes.all_pods(kube), query)
        if method == "DELETE":
            kubes.delete_pods(kube, {pod["metadata"]["name"] for pod in found})
        return page(found, query)
    if kube.settings.missing == "operator":
        return None
    if method == "GET":
        found = [one.body for one in kube.made.values() if query["labelSelector"] in one.body["metadata"]["labels"]]
        return page(found, query)
    if method == "POST":
        return create(kube, body)
    if parts[1] not in kube.made:
        raise Refused(404, "NotFound", f'rayclusters.ray.io "{parts[1]}" not found')
    one = kube.made[parts[1]]
    if one.leaving is None:
        one.leaving = time.monotonic()
        one.body["metadata"]["deletionTimestamp"] = one.body["metadata"]["creationTimestamp"]
        kube.say(f"{parts[1]} is to go")
    return one.body


def page(found: list[Any], query: dict[str, str]) -> dict[str, Any]:
    first, limit = int(query.get("continue") or 0), int(query.get("limit") or len(found))
    after = {"continue": str(first + limit)} if first + limit < len(found) else {}
    return {"metadata": after, "items": found[first : first + limit]}


def create(kube: Kube, body: Any) -> Any:
    name = body["metadata"]["name"]
    if kube.settings.quota == "objects":
        said = kubes.QUOTA.format("count/rayclusters.ray.io=1")
        raise Refused(403, "Forbidden", f'rayclusters.ray.io "{name}" is forbidden: {said}')
    if name in kube.made:
        raise Refused(409, "AlreadyExists", f'rayclusters.ray.io "{name}" already exists')
    body["metadata"]["uid"] = f"uid-of-{name}"
    body["metadata"]["creationTimestamp"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    kube.made[name] = Made(body, time.monotonic())
    kube.say(f"{name} asked for")
    return body


def events(kube: Kube) -> list[dict[str, Any]]:
    """Of the autoscaler."""
    waiting = [pod["metadata"]["name"] for pod in kubes.all_pods(kube) if pod["status"]["phase"] == "Pending"]
    lacking = kube.settings.free is not None
    return [{"involvedObject": {"name": name}, "message": kubes.SCALE_UP} for name in waiting if lacking]


def answer(kube: Kube, method: str, path: str, body: Any) -> tuple[int, Any]:
    """A status of 0 is none: the connection ends."""
    split = urlsplit(path)
    query = {key: values[0] for key, values in parse_qs(split.query).items()}
    parts = split.path.strip("/").split("/")
    namespace = parts.index("namespaces")
    verb = VERBS[method] + ("collection" if method == "DELETE" and len(parts) == namespace + 3 else "")
    with kube.lock:
        kube.calls.append((time.time(), f"{verb} {parts[namespace + 2]}"))
        kube.hook(verb, "before")
        bad = kube.dice.choice([0, 500, 503]) if kube.dice.random() < kube.settings.trouble else None
        failed = {"kind": "Status", "code": bad, "reason": "InternalError", "message": "by script"}
        if bad is not None and kube.dice.random() < 0.5:
            return bad, failed
        try:
            if kube.settings.denied == verb:
                kind = parts[namespace + 2]
                said = f'{kind} is forbidden: User "me" cannot {verb} resource "{kind}"'
                raise Refused(403, "Forbidden", f'{said} in the namespace "{parts[namespace + 1]}"')
            found = obey(kube, method, parts[namespace + 2 :], query, body)
        except Refused as refused:
            return refused.answer["code"], refused.answer
        kube.hook(verb, "after")
        if bad is not None:
            return bad, failed
        return (404, "404 page not found") if found is None else (200, json.loads(json.dumps(found)))


def handler(kube: Kube) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, found = answer(kube, self.command, self.path, body)
            if status == 0:
                self.close_connection = True
                return
            data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = reply  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def failed(*_: Any) -> None:
    if not isinstance(sys.exception(), ConnectionError):  # who asked may have been killed
        traceback.print_exc()


def go_on(kube: Kube) -> None:
    while not kube.ended.wait(TICK_S):
        with kube.lock:
            kubes.tick(kube)


def look_after(kube: Kube) -> None:
    """Probes take their time, in which calls are answered."""
    while not kube.ended.wait(TICK_S):
        for pod in [pod for one in list(kube.made.values()) if one.leaving is None for pod in one.pods]:
            pods.look_after(kube.place, pod, kube.lock)


@contextmanager
def serve(settings: Settings) -> Iterator[Kube]:
    folder = Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp"))
    reaper = simulated.start_reaper(folder)
    kube = Kube(settings, pods.Place(folder, reaper, settings.dashboard))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(kube))
    server.handle_error = failed  # type: ignore[method-assign]
    named = {"name": "emulated"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "emulated",
        "clusters": [named | {"cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [named | {"context": {"cluster": "emulated", "user": "emulated"}}],
        "users": [named | {"user": {}}],
    }
    kube.kubeconfig = str(folder / "kubeconfig")
    Path(kube.kubeconfig).write_text(yaml.safe_dump(config))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    threads = [threading.Thread(target=work, args=(kube,), daemon=True) for work in (go_on, look_after)]
    for thread in threads:
        thread.start()
    try:
        yield kube
    finally:
        kube.ended.set()
        for thread in threads:
            thread.join(10)
        server.shutdown()
        server.server_close()
        simulated.end(folder, reaper)


def overrides(kube: Kube) -> list[str]:
    at = f"cluster.gke.kubeconfig={kube.kubeconfig}"
    given = ["image=emulated", "claim=emulated", "mount=/", "poll_s=0.2"]  # the pods are where the disk is
    cache = f"run.cache={Path('~/.cache/gemma-orchestrator').expanduser()}"
    return ["cluster=gke", at, *(f"cluster.gke.{one}" for one in given), cache]


def main() -> None:
    found: dict[str, Any] = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for key, value in found.items():
        if key in ("hosts", "dashboard"):
            found[key] = value == "true"
        elif key not in ("denied", "quota", "missing"):
            found[key] = int(value) if key == "free" else float(value)
    with serve(Settings(**found)) as kube:
        print(" ".join(overrides(kube)), flush=True)
        shown = 0
        try:
            while True:
                time.sleep(0.2)
                for line in kube.log[shown:]:
                    print(line, flush=True)
                shown = len(kube.log)
        except KeyboardInterrupt:
            print(f"asked {len(kube.calls)} times; left: {' '.join(sorted(kube.made)) or 'nothing'}", flush=True)


if __name__ == "__main__":
    main()
