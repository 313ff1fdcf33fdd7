"""1536 hosts in the emulated cloud, no processes behind them: how long a look and what follows takes, how many calls.

python -m tests.bench.reconcile
"""

import statistics
import time

from orchestrator.slices import cloud, upkeep
from orchestrator.slices.wanted import State
from tests import cloud_tpu
from tests.cloud import Settings
from tests.test_config import config_of

SHAPES = [("v5p-12288", 1, 6144), ("v5p-64", 192, 6144), ("v5p-8", 1536, 6144)]
LOOKS = 20


def main() -> None:
    print(
        "slices        hosts  asking for all, s  calls  a steady step, s: median, longest  calls a minute at poll_s=5"
    )
    for slice_type, count, chips in SHAPES:
        with cloud_tpu.serve(Settings(provision_s=0.1, delete_s=0.1, hosts=False)) as emulated:
            shape = [
                f"cluster.slice={slice_type}",
                f"cluster.num_slices={count}",
                f"train.batch={chips}",
                "model.width=64",
            ]
            mesh = [f"mesh.replica={chips // min(64, chips // count)}", f"mesh.fsdp={min(64, chips // count)}"]
            config = config_of("cluster=gcp", f"cluster.gcp.endpoint={emulated.endpoint}", "run.id=x", *shape, *mesh)
            kept = cloud.upkeep(config, "x")
            began = time.monotonic()
            while sum(state is State.READY for state in kept.states.values()) < count:
                upkeep.step(kept)
            asked_s, calls = time.monotonic() - began, len(emulated.calls)
            took = []
            for _ in range(LOOKS):
                began = time.monotonic()
                upkeep.step(kept)
                took.append(time.monotonic() - began)
            # The second look of a step is the one that stands for Ray's nodes here.
            looks = (len(emulated.calls) - calls) / LOOKS / 2
            name = f"{count} x {slice_type}"
            print(
                f"{name:14}{chips // 4:5}  {asked_s:17.2f}  {calls:5}  {statistics.median(took):24.3f}, {max(took):.3f}"
                f"  {looks * 60 / 5:28.0f}"
            )


if __name__ == "__main__":
    main()
