"""cluster=local: slices simulated on this machine, a Ray node for each host. A first-class peer of the others."""

import atexit
import dataclasses
import itertools
import logging
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray

from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.hosts.placement import Spot
from orchestrator.interrupt import handlers_kept
from orchestrator.slices import auth
from orchestrator.slices.lease import Lease
from orchestrator.slices.simulated import rehearsed, simulated
from orchestrator.slices.simulated.raylet import Host
from orchestrator.slices.upkeep import NoSlicesError, managed

POLL_S = 0.2
NOTICED_S = 3.0  # for the run to see by itself that its head is lost


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
    plain = settings.is_plain and not config.scales  # else slices come and go
    made = hosts(config) if plain else {}
    folder = Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp"))
    auth.write_token(folder, auth.new_token())
    with auth.using(simulated.token_path(folder)):
        cluster = simulated.start(made, folder)
        check, left = partial(check_head, cluster), threading.Event()
        threading.Thread(target=watch_head, args=(cluster, config, left), name="head", daemon=True).start()
        try:
            with handlers_kept():
                ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            if plain:
                repair = partial(simulated.repair, cluster, made, config.cluster.repair_s)
                yield Lease(repair, partial(discard, cluster), lambda: None, check_head=check)
            else:
                with managed(rehearsed.upkeep(config, cluster), False, tell) as lease:
                    yield dataclasses.replace(lease, check_head=check)
        finally:
            left.set()
            if not simulated.lost_head(cluster):
                ray.shutdown()
            elif sys.exception() is not None:
                # Before Ray's own handler, which would wait for the head or crash.
                atexit.register(os._exit, int(Exit.GAVE_UP))
            simulated.stop(cluster)


def check_head(cluster: simulated.Cluster) -> None:
    """Raises NoSlicesError once the head has ended: nothing on the cluster can go on, nor be given back."""
    if gone := simulated.lost_head(cluster):
        raise NoSlicesError(f"the head of the local Ray cluster is lost: {gone}")


def watch_head(cluster: simulated.Cluster, config: Config, left: threading.Event) -> None:
    """Ends this process when the head is lost and a Ray call blocks the run's thread: that Ray call waits for
    a minute, cannot be cut short, and then ends the process without a word.
    """
    while not (gone := simulated.lost_head(cluster)):
        if left.wait(POLL_S):
            return
    if left.wait(NOTICED_S):
        return
    run = f"run={config.run.id} run.root={shlex.quote(str(config.run.root))}"
    said = f"gave up: the head of the local Ray cluster is lost: {gone}\nresume  python -m launch.resume {run}\n"
    os.write(2, said.encode())
    simulated.stop(cluster)
    os._exit(Exit.GAVE_UP)


def discard(cluster: simulated.Cluster, spot: Spot, _: str) -> None:
    """Ends the host, which is then lost as any other. Its successor has its address, but is another node."""
    simulated.end_node(cluster, spot.node_id)
