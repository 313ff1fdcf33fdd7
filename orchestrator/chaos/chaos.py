"""Faults on purpose, so that a run's recovery can be rehearsed on the cluster where it will be needed."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from orchestrator.chaos.faults import Fault
from orchestrator.hosts import group as hosts
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import Group
from orchestrator.record import rundir
from orchestrator.record.report import Report

FREEZE_S = 3.0  # a slow host stands still for so long
FULL_S = 6.0  # a disk is full for so long
STRIKE_S = 5.0  # for a keeper to do its worst


def strike(plan: Sequence[Fault], phase: str, group: Group, fleet: Fleet, report: Report) -> None:
    """Does what is due: one fault at a step, and on the way back to it one each amid check, compiling and restoring.

    A run that is never let go on gives up.

    Told first: a fault that ends the controller must not strike again when it is resumed.
    """
    moment = (report.newest, "step" if phase == "save" else phase)
    early = unsaved(plan, report)
    for fault in plan:
        due = fault.phase == phase and fault.step <= report.newest and fault.index not in report.struck
        if not due or fault.step in early or moment in report.struck_at:
            continue
        if fault.kind != "tear":  # which by itself brings nothing down
            report.struck_at.add(moment)
        report.struck.add(fault.index)
        report.event("chaos", report.newest, index=fault.index, fault=fault.kind, rank=fault.rank, phase=phase)
        report.screen.say(f"chaos: {fault.kind} at step {report.newest}, rank {fault.rank} ({phase})")
        do(fault, group, fleet, report)


def unsaved(plan: Sequence[Fault], report: Report) -> set[int]:
    """Steps of tears that have no checkpoint to tear yet. Whatever else is to strike there waits for the tear."""
    tears = {fault.step for fault in plan if fault.kind == "tear" and fault.index not in report.struck}
    saved = max(rundir.committed(report.folder), default=0) if tears else 0
    return {step for step in tears if step > saved}


def do(fault: Fault, group: Group, fleet: Fleet, report: Report) -> None:
    spot, worker = group.placement.spots[fault.rank], group.workers[fault.rank]
    keeper = fleet.keepers.get(spot.node_id)
    pid = group.pids[fault.rank] if group.pids else 0
    if fault.kind == "controller":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "nan":
        hosts.call(group, STRIKE_S, "poison")  # between two windows; nobody waits for the answers
    elif fault.kind == "tear":
        tear(report.folder)
    elif fault.kind == "chip":
        worker.spoil.remote()  # it hears of it before it is asked
    elif keeper is None or not pid:
        hosts.stop([worker])  # too early for more: the process is killed whatever was asked for
    elif fault.kind == "worker":
        done(keeper.signal.remote(pid, signal.SIGKILL))
    elif fault.kind == "crash":
        done(keeper.signal.remote(pid, signal.SIGSEGV))
    elif fault.kind == "preempt":
        done(keeper.signal.remote(pid, signal.SIGTERM))
    elif fault.kind == "hang":
        done(keeper.signal.remote(pid, signal.SIGSTOP))
    elif fault.kind == "slow":
        done(keeper.freeze.remote(pid, FREEZE_S))
    elif fault.kind == "full_disk":
        done(keeper.fill.remote(pid, FULL_S))
    elif fault.kind == "host":
        keeper.end_host.remote(pid)  # ends itself as well


def done(ref: Any) -> None:
    ray.wait([ref], timeout=STRIKE_S)


def tear(folder: Path) -> None:
    """Cuts the largest file of the newest checkpoint in half."""
    newest = folder / "checkpoints" / str(rundir.committed(folder)[-1])
    files = [path for path in newest.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
