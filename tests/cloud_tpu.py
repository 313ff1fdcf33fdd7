"""The Cloud TPU API v2alpha1 on loopback, as far as queued resources go, spoken to by Google's own client. Its slices'
hosts are processes here.

python -m tests.cloud_tpu [provision_s=1] [delete_s=0.2] [stock=ZONE:HOSTS,...] [empty=wait|fail] [quota=ZONE,...]
                          [denied=VERB] [trouble=0.2] [preempt_s=S] [notice_s=5] [hosts=true]

Prints the overrides with which launch.train uses it, and what it has been asked for as it goes. Ends with Ctrl-C.

stock: so many hosts are free in these zones; the others have any number. empty: whether a request that finds none
waits, or fails. quota: zones in which there is none. denied: ListQueuedResources, CreateQueuedResource ... is not
permitted. trouble: this share of calls fails with 500s and the like, half of them after they were obeyed. preempt_s:
the first slice is taken away so long after it was given, notice_s after its hosts were told.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.cloud import tpu_v2alpha1 as tpu
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, timestamp_pb2
from google.rpc import code_pb2, status_pb2

from orchestrator.slices.simulated import simulated
from orchestrator.slices.topology import slice_type
from tests import machines
from tests.cloud import Cloud, Given, Settings, States, tick, zone_of

TICK_S = 0.02
QUOTA = "Quota limit 'TPUV5sPodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone {}."


def list_all(cloud: Cloud, request: Any, context: grpc.ServicerContext) -> Any:
    zone = request.parent.rpartition("/")[2]
    found = [o.resource for n, o in sorted(cloud.given.items()) if zone in ("-", zone_of(o))]
    first = int(request.page_token or 0)
    page = found[first : first + (request.page_size or 100)]
    after = str(first + len(page)) if first + len(page) < len(found) else ""
    return tpu.ListQueuedResourcesResponse(queued_resources=page, next_page_token=after)


def create(cloud: Cloud, request: Any, context: grpc.ServicerContext) -> Any:
    resource, name = request.queued_resource, f"{request.parent}/queuedResources/{request.queued_resource_id}"
    zone = request.parent.rpartition("/")[2]
    if name in cloud.given:
        context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} already exists")
    node = resource.tpu.node_spec[0].node
    kind = slice_type(node.accelerator_type or node.metadata["gemma-slice-type"], node.metadata["gemma-topology"])
    if zone in cloud.settings.quota:
        return operation(cloud, status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=QUOTA.format(zone)))
    resource.name = name
    now = timestamp_pb2.Timestamp()
    now.GetCurrentTime()
    resource.create_time = now
    cloud.given[name] = Given(resource, kind.hosts, time.monotonic())
    cloud.move(cloud.given[name], States.ACCEPTED)
    return operation(cloud)


def delete(cloud: Cloud, request: Any, context: grpc.ServicerContext) -> Any:
    one = cloud.given.get(request.name)
    if one is None:
        context.abort(grpc.StatusCode.NOT_FOUND, f"{request.name} not found")
        raise AssertionError
    if one.resource.state.state not in (States.ACCEPTED, States.FAILED, States.SUSPENDED) and not request.force:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the nodes must be deleted first, or force given")
    if one.resource.state.state is not States.DELETING:
        cloud.move(one, States.DELETING)
    return operation(cloud)


def operation(cloud: Cloud, error: Any = None) -> Any:
    found = operations_pb2.Operation(name=f"operations/{len(cloud.operations)}", done=True)
    if error is not None:
        found.error.CopyFrom(error)
    else:
        packed = any_pb2.Any()
        packed.Pack(tpu.QueuedResource.pb(tpu.QueuedResource()))
        found.response.CopyFrom(packed)
    cloud.operations[found.name] = found
    # Told as under way at first, as Google does.
    return operations_pb2.Operation(name=found.name)


def get_operation(cloud: Cloud, request: Any, context: grpc.ServicerContext) -> Any:
    return cloud.operations[request.name]


VERBS: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "ListQueuedResources": (list_all, tpu.ListQueuedResourcesRequest, tpu.ListQueuedResourcesResponse),
    "CreateQueuedResource": (create, tpu.CreateQueuedResourceRequest, None),
    "DeleteQueuedResource": (delete, tpu.DeleteQueuedResourceRequest, None),
}


def obeyed(cloud: Cloud, verb: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A verb as the server does it: counted, and failing by script."""
    failures = [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED]

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        with cloud.lock:
            cloud.calls.append((time.time(), verb))
            cloud.hook(verb, "before")
            if cloud.settings.denied == verb:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, f"Permission 'tpu.nodes.{verb}' denied on resource")
            bad = cloud.dice.random() < cloud.settings.trouble
            if bad and cloud.dice.random() < 0.5:
                context.abort(cloud.dice.choice(failures), "by script, before")
            found = work(cloud, request, context)
            cloud.hook(verb, "after")
            if bad:
                context.abort(cloud.dice.choice(failures), "by script, after")
            return found

    return answer


def handlers(cloud: Cloud) -> list[Any]:
    api = {
        verb: grpc.unary_unary_rpc_method_handler(
            obeyed(cloud, verb, work),
            request_deserializer=asked.deserialize,
            response_serializer=told.serialize if told else operations_pb2.Operation.SerializeToString,
        )
        for verb, (work, asked, told) in VERBS.items()
    }
    operations = {
        "GetOperation": grpc.unary_unary_rpc_method_handler(
            obeyed(cloud, "GetOperation", get_operation),
            request_deserializer=operations_pb2.GetOperationRequest.FromString,
            response_serializer=operations_pb2.Operation.SerializeToString,
        )
    }
    return [
        grpc.method_handlers_generic_handler("google.cloud.tpu.v2alpha1.Tpu", api),
        grpc.method_handlers_generic_handler("google.longrunning.Operations", operations),
    ]


@contextmanager
def serve(settings: Settings) -> Iterator[Cloud]:
    folder = Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp"))
    reaper = simulated.start_reaper(folder)
    cloud = Cloud(settings, machines.Machines(folder, reaper))
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(tuple(handlers(cloud)))
    cloud.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    def go_on() -> None:
        while not cloud.ended.wait(TICK_S):
            with cloud.lock:
                tick(cloud)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        cloud.ended.set()
        thread.join(10)
        server.stop(0).wait(5)
        simulated.end(folder, reaper)


def parse(arguments: list[str]) -> Settings:
    found: dict[str, Any] = dict(argument.split("=", 1) for argument in arguments)
    for key, value in found.items():
        if key == "stock":
            found[key] = {zone: int(hosts) for zone, hosts in (pair.split(":") for pair in value.split(","))}
        elif key == "quota":
            found[key] = tuple(value.split(","))
        elif key == "hosts":
            found[key] = value == "true"
        elif key not in ("empty", "denied"):
            found[key] = float(value)
    return Settings(**found)


def main() -> None:
    with serve(parse(sys.argv[1:])) as cloud:
        print(f"cluster=gcp cluster.gcp.endpoint={cloud.endpoint} cluster.gcp.poll_s=0.2", flush=True)
        shown = 0
        try:
            while True:
                time.sleep(0.2)
                for line in cloud.log[shown:]:
                    print(line, flush=True)
                shown = len(cloud.log)
        except KeyboardInterrupt:
            left = sorted(name.rpartition("/")[2] for name in cloud.given)
            print(f"asked {len(cloud.calls)} times; left: {' '.join(left) or 'nothing'}", flush=True)


if __name__ == "__main__":
    main()
