"""Training on hosts that stand ready: from where the run can go on to its last step, saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.chaos import chaos, faults
from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts.memory import Attaching
from orchestrator.hosts.ready import ReadyHosts, Work
from orchestrator.programs import dispatch, rewind, saves
from orchestrator.programs import pipeline as pipelines
from orchestrator.programs.dispatch import Training
from orchestrator.programs.pipeline import Pipeline
from orchestrator.programs.saves import Saves
from orchestrator.record import rundir
from orchestrator.record.report import Report
from orchestrator.recovery import recover
from orchestrator.recovery.outcome import Evidence

if TYPE_CHECKING:
    from orchestrator.evaluation.in_loop import Asking


@contextmanager
def asked_too(config: Config, folder: Path, report: Report) -> Iterator[tuple[Work, None]]:
    """With eval.tasks: what is asked is rendered before slices are."""
    from orchestrator.evaluation import in_loop  # lm-eval: seconds that no other run pays

    report.phase("data", "rendering the requests of eval.tasks")
    yield partial(train, asking=in_loop.open_asking(config, folder)), None


def train(ready: ReadyHosts, asking: "Asking | None" = None) -> Exit | Evidence:
    """Keeps two windows in flight until the last step. All is saved when it returns: FINISHED, STOPPED, or what says
    that the run must move on. Raises HostsFailedError, TimeoutError where the last save does not succeed.
    """
    config, group, fleet, report = ready.config, ready.group, ready.fleet, ready.report
    facts = recover.restore(ready)
    planned = faults.plan(config.chaos, config.train.steps, len(group.workers))
    pipeline = Pipeline(ready, facts.step)
    training = Training(ready, pipeline, Saves(max(rundir.committed(report.folder), default=0)), asking=asking)
    patience_s = 0.0 if facts.fresh else fleets.PATIENCE_S
    attaching: Attaching | None = fleets.request_memory(fleet, group, ready.opened, patience_s)
    left: Exit | Evidence | None = None
    dispatch.send_due(training)
    while True:
        # A run that begins makes its first step before anything else.
        if attaching and (pipeline.sent or not facts.fresh) and attaching.ready():
            dispatch.send_keep(training, attaching)
            attaching = None
        left = pipelines.reason_to_leave(pipeline)
        goes_on = pipeline.step < config.train.steps and not left and not training.halted
        if goes_on and pipelines.has_room(pipeline):
            dispatch.send_steps(training)
            if training.saving:
                chaos.strike(planned, "save", group, fleet, report)
                training.saving = False
            continue
        if not pipeline.sent:
            break
        dispatch.receive(training)
        if training.halted and not pipeline.sent:
            rewind_hosts(training)
        chaos.strike(planned, "step", group, fleet, report)
        if "run" in pipeline.pace.usual and not attaching:
            fleets.start_spares(fleet)
    report.phase("save", f"saving step {pipeline.step}")
    dispatch.save_last(training, patient=left in (None, Exit.STOPPED) or pipeline.step == config.train.steps)
    return Exit.FINISHED if pipeline.step == config.train.steps else left or Exit.STOPPED


def rewind_hosts(training: Training) -> None:
    """Brings hosts that bad steps have halted back to a step before them, without new processes; or raises
    HostsFailedError where the run must stop.
    """
    ready, report = training.ready, training.ready.report
    bad = rewind.since_last_good(training.bad)
    decision = rewind.decide_rewind(ready.config.guard, bad, report.bad_steps)
    if isinstance(decision, rewind.Stop):
        raise dispatch.diverged(training, decision)
    report.phase("restore", f"going back from step {bad.step}")
    if decision.without_batch:
        report.event("skip_batch", bad.step, places=bad.places, ids=list(bad.ids))
    step = recover.go_back_to(ready, decision.step)
    report.phase("step", "training")
    training.pipeline.step = step
    saves.went_back(training.saves, rundir.committed(ready.folder), step)
    training.halted, training.bad = False, []
