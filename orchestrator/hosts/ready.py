"""Hosts on which a program is open: what the run hands to whatever is done on them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma.messages import Opened
from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import Group
from orchestrator.interrupt import Interrupt
from orchestrator.record.report import Report
from orchestrator.recovery.outcome import Evidence


@dataclass(frozen=True)
class ReadyHosts:
    """The hosts of one attempt: their processes have found each other, their chips are sound, the program is open."""

    config: Config  # with the slices that are there
    folder: Path  # the run directory
    group: Group
    opened: list[Opened]  # in rank order
    fleet: Fleet
    report: Report
    interrupt: Interrupt
    started: float  # time.monotonic() at which the processes were asked for


# What a run does on its hosts, from wherever it stands to its end. Returns how the run leaves, or the evidence for
# which it must move on (a host is drained, a lost slice is back). Raises HostsFailedError.
Work = Callable[[ReadyHosts], Exit | Evidence]


@dataclass(frozen=True)
class Load:
    """Of a server's replicas, at a moment."""

    running: int  # sequences
    waiting: int
    slots: int  # of the replicas that stand
    standing: int


Demand = Callable[[], Load]  # what there is to do now; called again and again
