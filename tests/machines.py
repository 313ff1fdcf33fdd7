"""TPU hosts as processes of this machine: each runs its start-up script, beside a metadata server of its own."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.slices.simulated import simulated
from orchestrator.slices.simulated.reaper import kill_groups
from tests import metadata_server

FIRST = 11  # addresses 127.0.1.11 and up: the head has 127.0.1.1


@dataclass
class Machines:
    """Of an emulated cloud; they end with it."""

    folder: Path
    reaper: Any
    used: set[int] = field(default_factory=set)  # numbers of addresses


@dataclass
class Machine:
    number: int
    process: Any
    metadata: Any  # its metadata server
    served: Any  # the context that it lives in


def boot(machines: Machines, attributes: dict[str, str], worker: int) -> Machine:
    """attributes: the metadata that the slice was asked for with."""
    number = next(n for n in range(FIRST, 255) if n not in machines.used)
    machines.used.add(number)
    served = metadata_server.serve()
    metadata = served.__enter__()
    given = attributes | {"agent-worker-number": str(worker)}
    metadata.says |= {f"instance/attributes/{key}": value for key, value in given.items()}
    metadata.says["instance/network-interfaces/0/ip"] = f"127.0.1.{number}"
    name = f"{attributes['gemma-slice']}-{worker}"
    script = machines.folder / f"{name}.sh"
    script.write_text(attributes["startup-script"])
    own = machines.folder / f"m{number}"  # a machine has a /tmp of its own
    own.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"GCE_METADATA_HOST": metadata.host, "PATH": path, "TMPDIR": str(own)}
    process = simulated.spawn(machines.reaper, machines.folder / f"{name}.log", env, ["bash", str(script)])
    return Machine(number, process, metadata, served)


def warn(machine: Machine) -> None:
    """What a spot machine is told 30 seconds before it is taken."""
    machine.metadata.says["instance/preempted"] = "TRUE"


def end(machines: Machines, machine: Machine) -> None:
    kill_groups({machine.process.pid})
    machine.process.wait(5.0)
    machine.served.__exit__(None, None, None)
    machines.used.discard(machine.number)
