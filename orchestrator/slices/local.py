"""cluster=local: slices simulated on this machine, a Ray node for each host. A first-class peer of the others."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray

from orchestrator.config import Config
from orchestrator.interrupt import handlers_kept
from orchestrator.slices import raylet, simulated
from orchestrator.topology import CHIPS_PER_HOST, NAME_LABEL, RANK_LABEL, TYPE_LABEL


def hosts(config: Config) -> list[raylet.Host]:
    """What the nodes of real slices would say of themselves."""
    kind = config.slice
    found = []
    for index in range(config.cluster.num_slices):
        name = f"simulated-{index}"
        for worker in range(kind.hosts):
            resources = {"TPU": float(CHIPS_PER_HOST), name: 1.0, "accelerator_type:TPU-V5P": 1.0}
            if worker == 0:
                resources[f"TPU-{kind.name}-head"] = 1.0
            labels = {
                NAME_LABEL: name,
                RANK_LABEL: str(worker),
                TYPE_LABEL: kind.name,
                "ray.io/tpu-topology": kind.topology,
                "ray.io/accelerator-type": "TPU-V5P",
            }
            env = {
                "TPU_NAME": name,
                "TPU_WORKER_ID": str(worker),
                "TPU_ACCELERATOR_TYPE": kind.name,
                "TPU_TOPOLOGY": kind.topology,
                # The checkout may not be installed; the hosts run what was launched.
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split()]
                ),
            }
            found.append(raylet.Host(cpus=1, resources=resources, labels=labels, env=env))
    return found


@contextmanager
def connect(config: Config, *_: object) -> Iterator[Callable[[], None]]:
    """Starts the nodes and ends them, with everything that runs on them."""
    made = hosts(config)
    cluster = simulated.start(made, Path(tempfile.mkdtemp(prefix="gemma-", dir="/tmp")))
    try:
        with handlers_kept():
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield partial(simulated.repair, cluster, made, config.cluster.repair_s)
    finally:
        ray.shutdown()
        simulated.stop(cluster)
