"""A Ray cluster that exists already: simulated TPU hosts, made as Ray's own tests make them. Prints its address.

python -m tests.existing_cluster [SLICES] [METADATA_HOST] [DASHBOARD_PORT]

The second: the metadata server of host 1 of slice 0. The third: its head has a dashboard, which takes jobs. Ends with
its standard input.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def cluster(*args: str) -> Iterator[str]:
    """Its address; it runs in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.existing_cluster", *args],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # of jobs
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate(timeout=60)


def main(slices: int = 1, metadata_host: str = "", dashboard_port: str = "") -> None:
    from ray.cluster_utils import Cluster

    dashboard = {"dashboard_port": int(dashboard_port)} if dashboard_port else {}
    head = {"num_cpus": 0, "include_dashboard": bool(dashboard)} | dashboard
    made = Cluster(initialize_head=True, head_node_args=head)
    for name in (f"s{index}" for index in range(slices)):
        for worker in (1, 0):  # not in rank order
            first = {"TPU-v5p-16-head": 1} if worker == 0 else {}
            asks = {"GCE_METADATA_HOST": metadata_host} if (name, worker) == ("s0", 1) and metadata_host else {}
            made.add_node(
                num_cpus=1,
                resources={"TPU": 4, name: 1, "accelerator_type:TPU-V5P": 1} | first,
                env_vars={"TPU_NAME": name, "TPU_WORKER_ID": str(worker), "TPU_ACCELERATOR_TYPE": "v5p-16"} | asks,
                labels={
                    "ray.io/tpu-slice-name": name,
                    "ray.io/tpu-worker-id": str(worker),
                    "ray.io/tpu-pod-type": "v5p-16",
                    "ray.io/tpu-topology": "2x2x2",
                },
            )
    print(made.address, flush=True)
    sys.stdin.read()
    made.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
