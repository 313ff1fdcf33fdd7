"""Where should a snapshot lie: in Ray's object store, or in memory that another process of the host holds (memfd)?

python -m tests.bench.stores [MB] [ROUNDS]

Seconds to write a share, interleaved, and whether it can still be read once its writer was killed.
"""

import os
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import RayError

from gemma.memory import slots
from orchestrator.hosts.keeper import Keeper


class Writer:
    """Stands for the training process."""

    def __init__(self) -> None:
        self.memory: slots.Slots | None = None

    def pid(self) -> int:
        return os.getpid()

    def put(self, share_bytes: int) -> tuple[list[ray.ObjectRef], float]:
        share = np.ones(share_bytes, np.uint8)
        started = time.monotonic()
        return [ray.put(share)], time.monotonic() - started

    def write(self, path: str, share_bytes: int, step: int) -> float:
        share = np.ones(share_bytes, np.uint8)
        if self.memory is None:
            self.memory = slots.open_slots(Path(path), share_bytes)
        memory = self.memory
        started = time.monotonic()
        slot, view = slots.begin(memory, step)
        np.frombuffer(view, np.uint8)[:] = share
        slots.commit(memory, slot, step, b'{"attempt": 1}')
        return time.monotonic() - started


def main() -> None:
    share_bytes = (int(sys.argv[1]) if len(sys.argv) > 1 else 200) << 20
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 12
    ray.init(num_cpus=1, object_store_memory=6 * share_bytes, include_dashboard=False, log_to_driver=False)
    writer = ray.remote(Writer).options(num_cpus=0).remote()
    keeper = Keeper("127.0.0.1", 600.0)
    path = keeper.hold("share", share_bytes)
    store, memory = [], []
    for step in range(rounds):
        refs, seconds = ray.get(writer.put.remote(share_bytes))
        store.append(seconds)
        memory.append(ray.get(writer.write.remote(path, share_bytes, step)))
    mb = share_bytes >> 20
    for name, times in (("Ray's object store", store), ("memory of a keeper", memory)):
        median = statistics.median(times[slots.SLOTS :])
        print(f"{name}: {mb} MB in {median * 1e3:.0f} ms (median of {rounds - slots.SLOTS}), {mb / median:.0f} MB/s")
    os.kill(ray.get(writer.pid.remote()), signal.SIGKILL)
    time.sleep(2.0)
    try:
        ray.get(refs[0], timeout=10)
        print("after its writer was killed, the object store: still there")
    except RayError as error:
        print(f"after its writer was killed, the object store: {type(error).__name__}")
    print(f"after its writer was killed, the keeper: steps {keeper.inventory().steps['share']}")
    ray.shutdown()


if __name__ == "__main__":
    main()
