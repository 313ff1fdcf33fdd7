"""What the controller does for a slice of 1536 hosts, and how that grows: real controller, workers that do nothing.

python -m tests.bench.hosts [HOSTS ...]

A few processes play all hosts, so that what is seen is the controller: calls to every host through Ray, their answers,
and everything that is made of them. One host is a process of its own, to be killed. For each number of hosts: seconds
to dispatch a window, the controller's CPU seconds a window, seconds from a host's death to its being classified and a
restart decided.
"""

import gc
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from gemma.memory.wire import Address
from gemma.messages import Restored, Row, WindowResult
from orchestrator.config import with_id
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import Group, HostsFailedError
from orchestrator.hosts.keeper import Held
from orchestrator.hosts.placement import Placement, Spot
from orchestrator.hosts.ready import ReadyHosts
from orchestrator.hosts.worker import VerbResult
from orchestrator.interrupt import Interrupt
from orchestrator.programs import dispatch
from orchestrator.programs.dispatch import Training
from orchestrator.programs.pipeline import Pipeline
from orchestrator.programs.saves import Saves
from orchestrator.programs.window import learn
from orchestrator.record import manifest, rundir
from orchestrator.record.report import Report
from orchestrator.recovery import recover
from orchestrator.recovery.policy import decide
from orchestrator.slices.lease import Lease, avoided
from tests.test_config import config_of

PLAYERS = 4
WINDOWS = 12
WINDOW = 10  # steps


class Player:
    """Plays many hosts and their keepers."""

    def play(self, rank: int, verb: str, *args: Any) -> Any:
        if verb == "call":
            name, *rest = args
            if name != "run":
                return VerbResult(None, None, None)
            first, last = rest[:2]
            metrics = {
                "loss": 1.0,
                "grad_norm": 1.0,
                "param_norm": 1.0,
                "learning_rate": 1.0,
                "targets": 1.0,
                "ok": 1.0,
            }
            rows = tuple(Row(step + 1, metrics, 1.0, time.time()) for step in range(first, last)) if rank == 0 else ()
            return VerbResult(WindowResult(rows, (), False, 0, 0.0, 0.0) if rank == 0 else None, None, None)
        if verb == "inventory":
            steps = {f"key-{rank}": ((10, 1), (11, 1), (12, 1)), f"key-{rank - 1}": ((10, 1), (11, 1), (12, 1))}
            return Held(Address("127.0.0.1", 1, ""), steps, {}, 12, {}, 0, None)
        return None

    def pid(self) -> int:
        return os.getpid()


@dataclass(frozen=True)
class Method:
    player: Any
    rank: int
    verb: str

    def remote(self, *args: Any) -> Any:
        return self.player.play.remote(self.rank, self.verb, *args)


@dataclass(frozen=True)
class Played:
    """Looks like the handle of a host's process, or of its keeper."""

    player: Any
    rank: int

    def __getattr__(self, verb: str) -> Method:
        return Method(self.player, self.rank, verb)


def measure(root: Path, count: int, players: list[Any]) -> dict[str, float]:
    config = with_id(
        config_of("train.steps=100000", "wandb.mode=disabled", "checkpoint.every=0", "eval.every=0"),
        f"hosts-{count}",
        str(root),
    )
    folder = rundir.create(str(root), f"hosts-{count}")
    rundir.write_manifest(folder, manifest.new(config, []))
    report = Report(config, folder, time.monotonic())
    report.begin_attempt()
    report.ledger.switch("step")
    report.facts = Restored(0, True, "", 1.0, 1, True, "cpu", {}, 100000, {}, ())
    victim = ray.remote(Player).options(num_cpus=0).remote()
    players = [victim, *players]
    workers = [Played(victim if rank == count - 1 else players[1 + rank % PLAYERS], rank) for rank in range(count)]
    spots = tuple(Spot("slice", rank, f"node-{rank}", "127.0.0.1") for rank in range(count))
    group = Group(tuple(workers), Placement(spots, None), (), tuple(range(1, count + 1)))  # type: ignore[arg-type]
    fleet = Fleet(
        config,
        "bench",
        Lease(lambda: None, avoided, lambda: None),
        keepers={spot.node_id: w for spot, w in zip(spots, workers, strict=True)},
    )
    fleet.keepers.pop(f"node-{count - 1}")
    fleet.keys = [f"key-{rank}" for rank in range(count)]
    ready = ReadyHosts(config, folder, group, [], fleet, report, Interrupt(), time.monotonic())
    training = Training(ready, Pipeline(ready, 0), Saves(0))
    sending, work = [], []
    for _ in range(WINDOWS):
        learn(training.pipeline.pace, "run", [0.1])
        started, before = time.monotonic(), time.process_time()
        dispatch.send_steps(training)
        sending.append(time.monotonic() - started)
        dispatch.receive(training)
        work.append(time.process_time() - before)
    dispatch.send_steps(training)
    os.kill(ray.get(victim.pid.remote()), signal.SIGKILL)
    killed = time.monotonic()
    try:
        while True:
            dispatch.send_steps(training)
            dispatch.receive(training)
    except HostsFailedError as failed:
        seen = time.monotonic()
        history = [recover.diagnose(folder, failed, group, fleet, report)]
        decide(history, 3)
    decided = time.monotonic()
    report.close()
    return {
        "dispatch": statistics.median(sending),
        "work": statistics.median(work),
        "notice": seen - killed,
        "classify": decided - seen,
    }


def main() -> None:
    counts = [int(count) for count in sys.argv[1:]] or [2, 96, 384, 1536]
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    players = [ray.remote(Player).options(num_cpus=0).remote() for _ in range(PLAYERS)]
    ray.get([player.pid.remote() for player in players])
    gc.freeze()  # as the controller does
    print("hosts  dispatch of a window  controller CPU a window  death seen  classified and decided")
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            found = measure(Path(folder), count, players)
            print(
                f"{count:5}  {found['dispatch'] * 1e3:13.1f} ms  {found['work'] * 1e3:16.1f} ms"
                f"  {found['notice']:11.2f} s  {found['classify']:11.3f} s",
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
