"""What snapshots and checkpoints cost: seconds of a step with them and without, by turns within one run.

Within one, because on the same machine two runs of the same program differ by more than what is to be seen.

python -m tests.bench.snapshots [ROUNDS] [STEPS_A_TURN]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.config import Config
from orchestrator.hosts import group as hosts
from orchestrator.hosts import memory, placement
from orchestrator.hosts.group import Group
from orchestrator.slices import providers
from tests.bench.compose import composed

WARMUP_STEPS = 30
SAVE_EVERY = 20
KINDS = ("neither", "snapshots", "checkpoints", "both")


def said(group: Group, verb: str, *args: Any) -> list[Any]:
    return [told.value for told in hosts.collect(hosts.call(group, 120.0, verb, *args))]


def attach(config: Config, group: Group) -> float:
    """Snapshots begin; returns the seconds that the devices take to pack one."""
    keepers = [memory.make("bench", spot, 600.0, None) for spot in group.placement.spots]
    opened = hosts.collect(hosts.open_programs(group, config, Path(config.run.root) / "bench"))
    said(group, "restore", None)
    keys = [one.share_key for one in opened]
    attaching = memory.attach(keepers, keys, opened[0].share_bytes, 60.0)
    assert attaching.ready()
    arguments = memory.keep_arguments(attaching, keys, [spot.slice_name for spot in group.placement.spots], 1)
    kept = hosts.collect(hosts.call_each(group, 120.0, "keep", arguments))
    print(f"{opened[0].share_bytes / 1e6:.2f} MB a share, packed in {kept[0].value.pack_s * 1e3:.2f} ms")
    return float(kept[0].value.pack_s)


def turn(group: Group, first: int, steps: int, kind: str) -> float:
    """Seconds of a step, over so many, two windows in flight as in a run; a save before every twentieth."""
    every = 1 if kind in ("snapshots", "both") else 0
    ends = [*range(first + SAVE_EVERY // 2, first + steps, SAVE_EVERY // 2), first + steps]
    started = time.monotonic()
    waiting = []
    for index, last in enumerate(ends):
        begin = ends[index - 1] if index else first
        waiting.append(hosts.call(group, 120.0, "run", begin, last, begin, every))
        if kind in ("checkpoints", "both") and index % 2 == 0:
            waiting.append(hosts.call(group, 120.0, "save", last))
        while len(waiting) > 3:
            hosts.collect(waiting.pop(0))
    for sent in waiting:
        hosts.collect(sent)
    took_s = (time.monotonic() - started) / steps
    said(group, "wait", 60.0)  # what is still being written is not the next turn's
    return took_s


def measure(config: Config, group: Group, rounds: int, steps: int) -> dict[str, list[float]]:
    attach(config, group)
    turn(group, 0, WARMUP_STEPS, "both")
    at, found = WARMUP_STEPS, {kind: [] for kind in KINDS}  # type: dict[str, list[float]]
    for index in range(rounds):
        for kind in KINDS if index % 2 == 0 else reversed(KINDS):
            found[kind].append(turn(group, at, steps, kind))
            at += steps
        print(", ".join(f"{kind} {1e3 * found[kind][-1]:.1f}" for kind in KINDS), "ms a step", flush=True)
    return found


def main() -> None:
    global KINDS
    if len(sys.argv) > 3:
        KINDS = tuple(sys.argv[3].split(","))
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    total = WARMUP_STEPS + rounds * len(KINDS) * steps
    with tempfile.TemporaryDirectory() as root:
        config = composed([f"run.root={root}", "run.id=bench", f"train.steps={total}", "checkpoint.keep_last=1"])
        folder = Path(root) / "bench"
        (folder / "logs").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        with providers.connect(config, print, lambda: False) as given:
            place = placement.reserve(config, lambda waited_s: [1] if waited_s < 60 else [], (), given.repair)
            group = hosts.join(hosts.spawn(config, place, folder, 1, {}, {}), config, lambda: False)
            found = measure(config, group, rounds, steps)
    base = found["neither"]
    print(f"neither: median {1e3 * statistics.median(base):.1f} ms a step")
    for kind in KINDS[1:]:
        ratios = sorted(without / with_it for with_it, without in zip(found[kind], base, strict=True))
        medians = statistics.median(base) / statistics.median(found[kind])
        print(
            f"{kind}: steps/s over those with neither: median of the rounds {statistics.median(ratios):.3f}"
            f" ({ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f} the middle half),"
            f" of the medians {medians:.3f}"
        )


if __name__ == "__main__":
    main()
