"""cluster=gcp as a run, or launch.cluster, has it: a Ray head, slices that join it, all of it given back."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from google.protobuf import json_format

from gemma.config import ConfigError
from orchestrator.config import Config
from orchestrator.slices import auth, existing, gcp, guest, head, startup
from orchestrator.slices.cluster import Cluster
from orchestrator.slices.lease import Lease
from orchestrator.slices.topology import slice_type
from orchestrator.slices.upkeep import Provider, Upkeep, managed
from orchestrator.slices.wanted import Create, Request, Wanted, request_name


def open_provider(
    config: Config, owner: str, joined: Callable[[], set[str]] | None = None, token: str | None = None
) -> Provider:
    """What an owner may ask of it. joined: the slices in the Ray cluster; where nobody looks, all of them.
    token: with which the hosts join.

    Raises ConfigError where there are no credentials, or a file is missing.
    """
    cluster = config.cluster
    assert cluster.gcp is not None
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.getLogger("google").setLevel(logging.ERROR)
    script, at, api = startup.script(cluster.gcp), head.address(cluster, cluster.gcp), gcp.api(cluster.gcp)

    def create(asked: Create) -> None:
        gcp.create(api, gcp.queued_resource(cluster, owner, asked, api.project, script, at, token))

    def list_requests() -> list[Request]:
        return gcp.list_requests(api, cluster.gcp.zones if cluster.gcp else ())

    def every_name() -> set[str]:
        return {r.name for r in list_requests()}

    return Provider(list_requests, create, partial(gcp.delete, api), joined or every_name)


def upkeep(
    config: Config, owner: str, joined: Callable[[], set[str]] | None = None, token: str | None = None
) -> Upkeep:
    assert config.cluster.gcp is not None
    provider = open_provider(config, owner, joined, token or cluster_token(config, owner))
    return Upkeep(wanted(config.cluster, owner), provider, config.cluster.gcp.poll_s, config.cluster.gcp.rejoin_s)


def cluster_token(config: Config, owner: str) -> str | None:
    """Of the Ray cluster that the slices join: of a head that is there, this user's; else that which the owner's slices
    have already, as they outlive a head; else a new one.
    """
    cluster = config.cluster
    assert cluster.gcp is not None
    if cluster.address is not None:
        try:
            return auth.user_token()
        except OSError as error:
            raise ConfigError(f"cluster.address={cluster.address}: no token for it ({error})") from error
    startup.script(cluster.gcp)  # what is wrong with it is known before anybody is asked
    return gcp.token_of(gcp.api(cluster.gcp), owner) or auth.new_token()


def wanted(cluster: Cluster, owner: str) -> Wanted:
    assert cluster.gcp is not None
    kind = slice_type(cluster.slice, cluster.topology)
    named, zones, patience_s = cluster.name is not None, cluster.gcp.zones, cluster.gcp.patience_s
    return Wanted(owner, kind.name, kind.topology, cluster.num_slices, zones, patience_s, named=named)


def rendered(config: Config, owner: str) -> str:
    """The first slice's request, as the API is given it."""
    cluster = config.cluster
    assert cluster.gcp is not None
    ask = Create(request_name(owner, 0.0, 0), cluster.gcp.zones[0])
    project = cluster.gcp.project or "PROJECT"
    script, at = startup.script(cluster.gcp), cluster.address or f"HEAD:{cluster.gcp.port}"
    message = gcp.queued_resource(cluster, owner, ask, project, script, at, "TOKEN")
    return json.dumps(json_format.MessageToDict(type(message).pb(message)), indent=2)


@contextmanager
def connect(config: Config, tell: Callable[[str, str], None], _: object) -> Iterator[Lease]:
    """Slices that are to be kept are not given back at the end."""
    cluster = config.cluster
    assert cluster.gcp is not None
    assert config.run.id is not None
    owner = cluster.name or config.run.id
    code = Path(config.run.root).expanduser() / config.run.id / "code"
    head.check(cluster, cluster.gcp)
    token = cluster_token(config, owner)
    keeping = upkeep(config, owner, partial(existing.joined, config), token)
    keep = cluster.keep or cluster.name is not None
    with (
        managed(keeping, keep, tell) as lease,  # asked first: the head comes up meanwhile
        head.running_head(cluster, cluster.gcp, token) as address,
        existing.connected(address, job=guest.job(code)),  # kept hosts may have joined with other code
    ):
        head.give_code(address)
        keeping.head_answers = partial(head.listens, address)
        yield lease
