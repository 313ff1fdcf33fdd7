"""What each TPU host runs when it starts: it joins the Ray cluster whose head its metadata names, for as long as it is.

Only what the metadata server says goes into it, so a machine that restarts, or whose head was replaced at the same
address, joins anew.
"""

from pathlib import Path

from gemma.config import ConfigError
from orchestrator.cluster import Gcp
from orchestrator.topology import CHIPS_PER_HOST

SCRIPT = """#!/bin/bash
# Of gemma-orchestrator. Joins this TPU host to a Ray cluster, again and again.
ask() {
  curl --noproxy '*' -sf --retry 10 --retry-connrefused --retry-delay 1 -H 'Metadata-Flavor: Google' \\
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/$1"
}
HEAD=$(ask attributes/gemma-head)
export TPU_NAME=$(ask attributes/gemma-slice)
export TPU_WORKER_ID=$(ask attributes/agent-worker-number)
export TPU_ACCELERATOR_TYPE=$(ask attributes/gemma-slice-type)
export TPU_TOPOLOGY=$(ask attributes/gemma-topology)
IP=$(ask network-interfaces/0/ip)
RESOURCES="{\\"TPU\\": CHIPS, \\"$TPU_NAME\\": 1"
[ "$TPU_WORKER_ID" = 0 ] && RESOURCES="$RESOURCES, \\"TPU-$TPU_ACCELERATOR_TYPE-head\\": 1"
RESOURCES="$RESOURCES}"
LABELS="ray.io/tpu-slice-name=$TPU_NAME,ray.io/tpu-worker-id=$TPU_WORKER_ID"
LABELS="$LABELS,ray.io/tpu-pod-type=$TPU_ACCELERATOR_TYPE,ray.io/tpu-topology=$TPU_TOPOLOGY"
export RAY_USAGE_STATS_ENABLED=0
SETUP
while true; do
  JOIN
  sleep 1
done
"""
RAY = (
    '-m ray.scripts.scripts start --block --disable-usage-stats --address="$HEAD" --node-ip-address="$IP"'
    ' --num-cpus=1 --resources="$RESOURCES" --labels="$LABELS" --object-store-memory=1000000000'
)
CONTAINER = (
    "docker run --rm --name gemma --privileged --net=host --ipc=host --shm-size=16g"
    " -e TPU_NAME -e TPU_WORKER_ID -e TPU_ACCELERATOR_TYPE -e TPU_TOPOLOGY -e RAY_USAGE_STATS_ENABLED -v /tmp:/tmp"
)


def script(gcp: Gcp) -> str:
    """Raises ConfigError where the user's own part cannot be read."""
    setup = ""
    if gcp.startup_script is not None:
        try:
            setup = Path(gcp.startup_script).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cluster.gcp.startup_script={gcp.startup_script}: cannot be read ({error})") from error
        setup = f"(\n{setup.rstrip()}\n)"  # its exit is not the script's
    join = f"{gcp.python} {RAY}"
    if gcp.image is not None:
        join = f"docker rm -f gemma >/dev/null 2>&1; {CONTAINER} {gcp.image} {join}"
    filled = SCRIPT.replace("CHIPS", str(CHIPS_PER_HOST)).replace("SETUP", setup)
    return filled.replace("JOIN", join)
