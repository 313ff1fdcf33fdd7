"""cluster=local: slices simulated on this machine, a Ray node for each host. A first-class peer of the others."""

import dataclasses
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray

from orchestrator.config import Config
from orchestrator.hosts.placement import Spot
from orchestrator.interrupt import handlers_kept
from orchestrator.slices import auth
from orchestrator.slices.lease import Lease
from orchestrator.slices.simulated import rehearsed, simulated
from orchestrator.slices.simulated.raylet import Host
from orchestrator.slices.upkeep import NoSlicesError, kept


def hosts(config: Config) -> dict[int, Host]:
    """Those of all slices, by index."""
    slices = (simulated.slice_hosts(config.slice, f"simulated-{index}") for index in range(config.cluster.num_slices))
    return dict(enumerate(itertools.chain(*slices)))


@contextmanager
def connect(config: Config, tell: Callable[[str, str], None], _: object) -> Iterator[Lease]:
    """Starts the nodes and ends them, with everything that runs on them. The slices are there at once, unless
    cluster.local says otherwise.
    """
    settings = config.cluster.local
    assert settings is not None
    made = hosts(config) if settings.is_plain else {}
    folder = Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp"))
    auth.write_token(folder, auth.new_token())
    with auth.using(simulated.token_path(folder)):
        cluster = simulated.start(made, folder)
        check = partial(check_head, cluster)
        try:
            with handlers_kept():
                ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            if settings.is_plain:
                repair = partial(simulated.repair, cluster, made, config.cluster.repair_s)
                yield Lease(repair, partial(discard, cluster), lambda: None, check_head=check)
            else:
                with kept(rehearsed.upkeep(config, cluster), False, tell) as lease:
                    yield dataclasses.replace(lease, check_head=check)
        finally:
            if not simulated.lost_head(cluster):
                ray.shutdown()
            simulated.stop(cluster)


def check_head(cluster: simulated.Cluster) -> None:
    """Raises NoSlicesError once the head has ended: nothing on the cluster can go on, nor be given back."""
    if gone := simulated.lost_head(cluster):
        raise NoSlicesError(f"the head of the local Ray cluster is lost: {gone}")


def discard(cluster: simulated.Cluster, spot: Spot, _: str) -> None:
    """Ends the host, which is then lost as any other. Its successor has its address, but is another node."""
    simulated.end_node(cluster, spot.node_id)
