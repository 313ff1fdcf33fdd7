"""A Ray cluster that exists already: two simulated TPU hosts, made as Ray's own tests make them. Prints its address.

Run as a script; ends with its standard input.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for worker in (1, 0):  # not in rank order
        head = {"TPU-v5p-16-head": 1} if worker == 0 else {}
        cluster.add_node(
            num_cpus=1,
            resources={"TPU": 4, "s0": 1, "accelerator_type:TPU-V5P": 1} | head,
            env_vars={"TPU_NAME": "s0", "TPU_WORKER_ID": str(worker), "TPU_ACCELERATOR_TYPE": "v5p-16"},
            labels={
                "ray.io/tpu-slice-name": "s0",
                "ray.io/tpu-worker-id": str(worker),
                "ray.io/tpu-pod-type": "v5p-16",
                "ray.io/tpu-topology": "2x2x2",
            },
        )
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
