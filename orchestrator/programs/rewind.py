"""Back from bad steps, without new processes: to a step before them, and on from there."""

from collections.abc import Sequence
from dataclasses import dataclass

from gemma.config import Guard
from gemma.messages import Bad, Opened
from orchestrator.hosts import group as hosts
from orchestrator.hosts import memory
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import HostsFailedError
from orchestrator.programs import saves
from orchestrator.programs.pipeline import Pipeline
from orchestrator.record import rundir
from orchestrator.recovery import recover
from orchestrator.recovery.outcome import Evidence

RECENT = 100  # steps, among which the guard's budget counts


@dataclass(frozen=True)
class GoBack:
    """To this step at the latest; without the batch, where it is to blame."""

    step: int
    without_batch: bool


@dataclass(frozen=True)
class Stop:
    reason: str


def decide(guard: Guard, bad: Bad, before: Sequence[int]) -> GoBack | Stop:
    """What to do once bad steps have halted the hosts. Pure. before: every bad step of the run, these included."""
    recent = [step for step in before if bad.step - RECENT < step <= bad.step + RECENT]
    if guard.action == "stop":
        return Stop(f"step {bad.step} is bad: guard.action=stop")
    if len(recent) > guard.budget:
        return Stop(f"{len(recent)} bad steps among the last {RECENT}: guard.budget={guard.budget}")
    if guard.action == "rollback":
        return GoBack(max(0, bad.step - guard.rollback_steps), without_batch=True)
    # Passed over, and the steps after it are bad as well: it is the state that is bad, not the batch.
    return GoBack(max(0, bad.step - 1), without_batch=False)


def rewind(pipeline: Pipeline, opened: Sequence[Opened], fleet: Fleet) -> None:
    """Brings the hosts back as decided. Raises HostsFailedError where the run must stop."""
    report, folder, group, bad = pipeline.report, pipeline.report.folder, pipeline.group, pipeline.bad
    assert bad is not None
    decision = decide(pipeline.config.guard, bad, report.bad_steps)
    if isinstance(decision, Stop):
        message = f"{decision.reason}; batch {bad.batch}, rows {list(bad.ids)} of the corpus"
        raise HostsFailedError([Evidence(0, exception="Diverged", message=message)])
    report.phase("restore", f"going back from step {bad.step}")
    held = memory.inventory(fleet.keepers)
    nodes = [spot.node_id for spot in group.placement.spots]
    branches = memory.branches(rundir.events(folder))
    common = memory.newest_common(fleet.keys, nodes, held, branches, decision.step)
    saved = max([step for step in rundir.committed(folder) if step <= decision.step], default=None)
    if common is not None and common.step < (saved or 0):
        common = None
    step = common.step if common else saved
    if decision.without_batch:
        report.event("skip_batch", bad.step, batch=bad.batch, ids=list(bad.ids))
    for later in [later for later in rundir.committed(folder) if later > (step or 0)]:
        report.event("set_aside", later, reason="beyond the step that the run went back to")
    recover.go_back(fleet, step or 0, pipeline.config.timeout.start_s)
    sources = [None] * len(opened) if common is None else recover.sources_of(common, held, group, opened)
    skipped, report.restoring = rundir.skipped_batches(folder), None if common else saved
    call = hosts.call_each(
        group, pipeline.config.timeout.restore_s, "restore", [(step, source, skipped, True) for source in sources]
    )
    hosts.collect(call)
    report.restoring = None
    report.event("restore", step or 0, source="memory" if common else "disk" if step else "start")
    report.phase("step", "training")
    pipeline.step = step or 0
    saves.went_back(pipeline.saves, report, pipeline.step)
    pipeline.halted, pipeline.bad = False, None
