"""From a failure to hosts that stand ready again: what it was, and where to go on from."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray

from gemma.config import ConfigError
from gemma.memory.wire import Source
from gemma.messages import Restored
from gemma.text import order as orders
from orchestrator.chaos import chaos, faults
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts import group as hosts
from orchestrator.hosts import memory, placement, witness
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import Group, HostsFailedError
from orchestrator.hosts.keeper import Held
from orchestrator.hosts.memory import CommonStep
from orchestrator.hosts.ready import ReadyHosts
from orchestrator.record import rundir
from orchestrator.record.report import Report
from orchestrator.recovery import checkpoints
from orchestrator.recovery.checkpoints import UNREADABLE, LostError
from orchestrator.recovery.outcome import Evidence, Outcome, classify
from orchestrator.recovery.policy import Failure


def restore(ready: ReadyHosts) -> Restored:
    """Brings the hosts to the newest step that all can go on from: in memory, else on disk, else the beginning."""
    folder, fleet, opened, report = ready.folder, ready.fleet, ready.opened, ready.report
    saved = newest_checkpoint(folder)
    held = memory.inventory(fleet.keepers)
    fleet.keys = [one.share_key for one in opened]
    fleet.ooms |= {node: one.ooms for node, one in held.items()}
    common = common_snapshot(held, ready, saved or 0)
    step = common.step if common else saved
    report.restoring = None if common else saved
    where = "initialising" if step is None else f"restoring step {step} from {'memory' if common else 'disk'}"
    report.phase("start", where)
    drop_later_snapshots(fleet, step or 0, ready.config.timeout.start_s)
    sources = [None] * len(opened) if common is None else sources_of(common, held, ready)
    report.order = orders.recorded(rundir.events(folder), step or 0, ready.config.train.batch)
    arguments = [(step, source, report.order) for source in sources]
    return stand_at(ready, arguments, common.attempt if common else None)


def stand_at(ready: ReadyHosts, arguments: Sequence[tuple[Any, ...]], snapshot_of: int | None) -> Restored:
    """The verb `restore`, its arguments in rank order; what rank 0 answers. The run is ready from here on.

    snapshot_of: the attempt whose snapshot is restored, if any.
    """
    config, group, fleet, report = ready.config, ready.group, ready.fleet, ready.report
    call = hosts.call_each(group, config.timeout.restore_s, "restore", arguments)
    planned = faults.plan(config.chaos, config.train.steps, len(group.workers))
    chaos.strike(planned, "restore", group, fleet, report)
    restored: list[Restored] = [result.value for result in hosts.collect(call, ready.interrupt.asked)]
    same_text(ready.folder, {one.fingerprint for one in restored}, config.resume.allow_data_change)
    if any(one.eval_fingerprints != restored[0].eval_fingerprints for one in restored):
        raise ConfigError("eval.sets: the hosts do not see the same text; give paths that all of them share")
    report.phase("step", "serving" if config.serve else "evaluating" if config.evaluate else "training")
    report.ready(restored[0], snapshot_of, time.monotonic() - ready.started)
    return restored[0]


def go_back_to(ready: ReadyHosts, limit: int) -> int:
    """Brings hosts that stand ready back to the newest step up to `limit`; returns it. What lies beyond it is dropped:
    the steps that come next replace it.
    """
    folder, report, fleet = ready.folder, ready.report, ready.fleet
    held = memory.inventory(fleet.keepers)
    saved = max([step for step in rundir.committed(folder) if step <= limit], default=0)
    common = common_snapshot(held, ready, saved, limit)
    step = common.step if common else saved
    for later in [later for later in rundir.committed(folder) if later > step]:
        report.event("set_aside", later, reason="beyond the step that the run went back to")
    drop_later_snapshots(fleet, step, ready.config.timeout.start_s)
    sources = [None] * len(ready.opened) if common is None else sources_of(common, held, ready)
    report.order = orders.recorded(rundir.events(folder), step, ready.config.train.batch)
    arguments = [(step if common or step else None, source, report.order, True) for source in sources]
    report.restoring = None if common else saved
    hosts.collect(hosts.call_each(ready.group, ready.config.timeout.restore_s, "restore", arguments))
    report.restoring = None
    where = "memory" if common else "disk" if step else "start"
    report.event("restore", step, source=where, batches=report.order.batches)
    return step


def common_snapshot(held: Mapping[str, Held], ready: ReadyHosts, saved: int, limit: int = 2**62) -> CommonStep | None:
    """The newest step up to `limit` that the hosts' memories hold in common, unless the disk holds a later one."""
    nodes = [spot.node_id for spot in ready.group.placement.spots]
    branches = memory.branches(rundir.events(ready.folder))
    common = memory.newest_common(ready.fleet.keys, nodes, held, branches, limit)
    return common if common is not None and common.step >= saved else None


def sources_of(common: CommonStep, held: Mapping[str, Held], ready: ReadyHosts) -> list[Source | None]:
    """Where each rank reads its share: a path on its own host, an address elsewhere."""
    found: list[Source | None] = []
    for node, spot, one in zip(common.nodes, ready.group.placement.spots, ready.opened, strict=True):
        here = node == spot.node_id
        found.append(Source(held[node].paths[one.share_key], None) if here else Source(None, held[node].address))
    return found


def drop_later_snapshots(fleet: Fleet, step: int, timeout_s: float) -> None:
    """No memory holds a step beyond this one any more: it would belong to a history that is now replaced."""
    refs = [keeper.go_back.remote(step) for keeper in fleet.keepers.values()]
    ray.wait(refs, num_returns=len(refs), timeout=timeout_s) if refs else None


def same_text(folder: Path, prints: set[str], allow_change: bool) -> None:
    """Refuses hosts that read different tokens, and tokens other than those the run has trained on."""
    if len(prints) > 1:
        raise ConfigError("data.path: the hosts do not see the same text; give a path that all of them share")
    before = [event["fingerprint"] for event in rundir.events(folder) if "fingerprint" in event]
    if before and {before[-1]} != prints and not allow_change:
        raise ConfigError(
            "data: the text or tokenizer is not what this run has trained on, so its batches would be others;"
            " allowed with resume.allow_data_change=true"
        )


def newest_checkpoint(folder: Path) -> int | None:
    """The step to go on from. Raises HostsFailedError where what was committed is gone."""
    try:
        return checkpoints.newest(folder)
    except LostError as lost:
        raise HostsFailedError([Evidence(0, exception="LostError", message=str(lost))]) from lost


def diagnose(folder: Path, failed: HostsFailedError, group: Group, fleet: Fleet, report: Report) -> Failure:
    """Finds out what a failure was, and writes its full story to a file. Raises ConfigError for the user's mistakes."""
    held = memory.inventory(fleet.keepers)
    fleets.note_departures(fleet, held)
    evidence = witness.investigate(failed.evidence, group, fleet, held, folder, report.attempt)
    kernel: dict[int, str] = {}
    if all(item.overdue for item in evidence):
        kernel = witness.dump_stacks(group, fleet, folder, report.attempt)
        evidence = [replace(item, stopped=witness.is_stopped(kernel.get(item.rank, ""))) for item in evidence]
    outcome, cause = classify(evidence)
    if outcome is Outcome.BAD_INPUT:
        raise ConfigError(cause.message)
    nodes = [spot.node_id for spot in group.placement.spots]
    common = memory.newest_common(fleet.keys, nodes, held, memory.branches(rundir.events(folder)))
    done = max([report.newest, *(one.done for one in held.values())])
    left = set_checkpoint_aside(folder, report) if outcome is Outcome.CHECKPOINT else 0
    answered = [report.newest] if report.config.evaluate or report.config.serve else []
    restorable = [*rundir.committed(folder), *([common.step] if common else []), *answered]
    told = tell(evidence, kernel)
    path = folder / "logs" / f"attempt-{report.attempt}-failure.txt"
    rundir.try_text(path, f"{outcome.value}: rank {cause.rank} at step {done}\n\n{told}")
    report.failed(outcome.value, cause, done, path)
    frames = [line.strip() for line in cause.traceback.splitlines() if line.lstrip().startswith("File ")]
    signature = " | ".join([outcome.value, cause.exception or "", cause.crash.partition("\n")[0], *frames[-1:]])
    return Failure(outcome, signature, done, max(restorable, default=None), left)


def record_move(cause: Evidence, fleet: Fleet, report: Report) -> Failure:
    """The run was told to move on, and has saved."""
    fleets.note_departures(fleet, memory.inventory(fleet.keepers))
    assert fleet.placement is not None
    if cause.notice == fleets.BACK:
        placement.release(fleet.placement)
        fleet.placement = None
    elif said := fleet.notices.get(fleet.placement.spots[cause.rank].node_id):
        cause = replace(cause, notice=said)
    outcome = Outcome.REGROWN if cause.notice == fleets.BACK else Outcome.PREEMPTED
    report.failed(outcome.value, cause, report.newest, None)
    return Failure(outcome, outcome.value, report.newest, report.newest)


def tell(evidence: list[Evidence], kernel: dict[int, str]) -> str:
    """The full story, host by host."""
    story = []
    for item in evidence:
        facts = {
            k: v for k, v in asdict(item).items() if v not in (None, "", False) and k not in ("traceback", "crash")
        }
        story += [f"rank {item.rank}: {facts}", item.crash, item.traceback, kernel.get(item.rank, "")]
    return "\n".join(filter(None, story)) + "\n"


def set_checkpoint_aside(folder: Path, report: Report) -> int:
    """Renames the checkpoint that could not be read, so that the one before is the newest. Returns how many are
    left; 0 also where nothing could be renamed, since the same would be tried again for ever.
    """
    step, report.restoring = report.restoring, None
    if step is None:
        return 0
    path = folder / "checkpoints" / str(step)
    aside = path.with_name(f"{step}{UNREADABLE}{report.attempt}")
    try:
        path.rename(aside)
    except OSError as error:
        report.screen.say(f"checkpoint {path} cannot be read, nor renamed ({error.strerror})")
        return 0
    report.event("set_aside", step, path=str(aside))
    report.screen.say(f"checkpoint {path} cannot be read; kept as {aside}")
    return len(rundir.committed(folder))
