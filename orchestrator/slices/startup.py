"""What each TPU host runs when it starts: it joins the Ray cluster whose head its metadata names, for as long as it is.

Only what the metadata server says goes into it, so a machine that restarts, or whose head was replaced at the same
address, joins again.
"""

from pathlib import Path

from gemma.config import ConfigError
from orchestrator.slices import join
from orchestrator.slices.cluster import Gcp

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
TOKEN=$(ask attributes/gemma-token)
SETUP
JOIN=$(cat <<'PYTHON'
import io, sys, tarfile, time
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
while not (code := client.internal_kv_get(KEY, SPACE, timeout=10)):
    time.sleep(0.1)
tarfile.open(fileobj=io.BytesIO(code)).extractall(sys.argv[2], filter="data")
sys.path.insert(0, sys.argv[2])
from orchestrator.slices import join
join.main(client, *sys.argv[1:])
PYTHON
)
while true; do
  DIR=$(mktemp -d -t gemma-XXXXXX)
  export RAY_AUTH_MODE=disabled
  if [ -n "$TOKEN" ]; then
    (umask 077; printf %s "$TOKEN" > "$DIR/auth_token")
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$DIR/auth_token"
  fi
  RUN -c "$JOIN" "$HEAD" "$DIR" "$IP"
  rm -rf "$DIR"
  sleep 0.5
done
"""
CONTAINER = (
    "docker run --rm --name gemma --privileged --net=host --ipc=host --shm-size=16g"
    " -e TPU_NAME -e TPU_WORKER_ID -e TPU_ACCELERATOR_TYPE -e TPU_TOPOLOGY"
    " -e RAY_AUTH_MODE -e RAY_AUTH_TOKEN_PATH -v /tmp:/tmp"
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
    run = gcp.python
    if gcp.image is not None:
        run = f"docker rm -f gemma >/dev/null 2>&1; {CONTAINER} {gcp.image} {gcp.python}"
    filled = SCRIPT.replace("SETUP", setup).replace("RUN", run)
    return filled.replace("KEY", repr(join.KEY)).replace("SPACE", repr(join.SPACE))
