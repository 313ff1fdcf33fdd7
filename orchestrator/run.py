"""The run, top to bottom: one process drives every host until the last step is done or given up."""

import contextlib
import gc
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import IO

from gemma.config import ConfigError
from gemma.messages import Opened
from orchestrator import change
from orchestrator import config as configs
from orchestrator.chaos import chaos, faults
from orchestrator.config import Config
from orchestrator.exit import HOW, Exit
from orchestrator.hosts import fitness
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts import group as hosts
from orchestrator.hosts.fleet import Fleet
from orchestrator.hosts.group import Group, HostsFailedError
from orchestrator.hosts.memory import Attaching
from orchestrator.interrupt import Interrupt, StoppedError
from orchestrator.programs import pipeline as pipelines
from orchestrator.programs import rewind
from orchestrator.programs.pipeline import Pipeline
from orchestrator.programs.saves import Saves
from orchestrator.record import rundir
from orchestrator.record.progress import summary
from orchestrator.record.report import Report, resume_command
from orchestrator.recovery import recover
from orchestrator.recovery.outcome import Evidence
from orchestrator.recovery.policy import Failure, GiveUp, decide
from orchestrator.slices import providers
from orchestrator.slices.upkeep import NoSlicesError

WINDOWS_IN_FLIGHT = 2
LOOK_EVERY_S = 1.0  # at whether the hosts will stay
WAITED_IN_VAIN = (StoppedError, TimeoutError, NoSlicesError)


def run(config: Config, folder: Path, lock: IO[str], interrupt: Interrupt, commanded: float) -> Exit:
    """Works on a run whose directory and manifest exist. Raises ConfigError, and then leaves no fresh run behind.

    lock: of the directory, let go at the end. commanded: the time.monotonic() at which the user asked, from which
    the first step is counted.
    """
    gc.freeze()  # Ray and all else that is imported stays: no need to go through it again and again
    report = Report(config, folder, commanded)
    try:
        code = drive(config, folder, report, interrupt)
    except ConfigError as error:
        interrupt.closing = True
        report.event("refuse", reason=str(error))
        report.close()
        if not report.newest and not rundir.committed(folder) and len(rundir.read_manifest(folder).attempts) == 1:
            shutil.rmtree(folder)  # made by this very command, and nothing was ever done in it
        raise
    except KeyboardInterrupt:
        report.event("stop", at_once=True)
        code = Exit.STOPPED
    except Exception:
        story = folder / "logs" / f"controller-{os.getpid()}-failure.txt"
        rundir.try_text(story, traceback.format_exc())
        report.event("give_up", story=str(story))
        report.screen.say(f"the controller failed: {traceback.format_exc().splitlines()[-1]} ({story})")
        code = Exit.GAVE_UP
    interrupt.closing = True
    goodput = report.close()
    command = resume_command(config, folder, f" train.steps={2 * config.train.steps}" if code is Exit.FINISHED else "")
    extending = change.extending(config.optim, config.train.steps) if code is Exit.FINISHED else None
    with contextlib.suppress(OSError):  # a full disk, or nobody who reads
        rows = rundir.metrics(folder)
        print(summary(folder, HOW[code], rows, goodput, report.first_step_s, command, extending), flush=True)
    lock.close()
    return code


def drive(config: Config, folder: Path, report: Report, interrupt: Interrupt) -> Exit:
    """Gets slices and gives them back. Raises ConfigError for the user's mistakes that only a host can see."""
    if stop_spending(report):
        return Exit.STOPPED
    report.phase("reserve", "starting the cluster")
    try:
        with (
            providers.connect(config, report.provided, interrupt.asked) as lease,
            fleets.managed(config, folder, lease) as fleet,
        ):
            return attempt(config, folder, fleet, report, interrupt)
    except WAITED_IN_VAIN as early:
        return left_waiting(early, report)


def attempt(config: Config, folder: Path, fleet: Fleet, report: Report, interrupt: Interrupt) -> Exit:
    """Trains until the last step, again and again."""
    history: list[Failure] = []
    while True:
        report.begin_attempt()
        group = None
        try:
            report.phase("reserve", "reserving slices")
            placement = fleets.reserve_hosts(fleet, interrupt.asked, report.screen.say)
            report.event("reserve", hosts=[spot.ip for spot in placement.spots], slices=placement.slices)
            now = configs.with_slices(config, placement.slices)
            report.phase("start", "starting hosts")
            started = time.monotonic()
            spares = fleets.take_spares(fleet)
            group = hosts.spawn(now, placement, folder, report.attempt, fleet.predecessors, spares)
            group = hosts.join(group, now, interrupt.asked)
            fleets.start_keepers(fleet, group)
            report.event("start", duration_s=time.monotonic() - started, pids=list(group.pids))
            fitness.check(now, group, fleet, report, interrupt.asked)
            opened = recover.start(now, folder, group, fleet, report, interrupt, started)
            left = train(now, group, opened, fleet, report, interrupt)
            if isinstance(left, Exit):
                report.event("finish" if left is Exit.FINISHED else "stop")
                fleet.needed = False
                return left
            history.append(recover.moved(left, fleet, report))
            report.decided(decide(history, config.retry.budget))
        except WAITED_IN_VAIN as early:
            return left_waiting(early, report)  # told before the slices are given back
        except HostsFailedError as failed:
            report.phase("down", "a host failed")
            assert group is not None
            history.append(recover.diagnose(folder, failed, group, fleet, report))
            decision = decide(history, config.retry.budget)
            report.decided(decision)
            if isinstance(decision, GiveUp):
                return Exit.GAVE_UP
        finally:
            if group:
                fleets.kill(fleet, group)
            report.write_goodput(now=True)


def left_waiting(early: Exception, report: Report) -> Exit:
    """The run ends while it waits for slices or hosts: the user asked for that, or they do not come."""
    if isinstance(early, StoppedError):
        report.event("stop", waiting_for=str(early))
        return Exit.STOPPED
    report.event("give_up", reason=str(early))
    report.screen.say(f"gave up: {early}")
    return Exit.GAVE_UP


def train(
    config: Config, group: Group, opened: list[Opened], fleet: Fleet, report: Report, interrupt: Interrupt
) -> Exit | Evidence:
    """Keeps two windows in flight until the last step. All is saved when it returns: FINISHED, STOPPED, or what says
    that the run must move on.
    """
    assert report.facts is not None
    left: Exit | Evidence | None = None
    looked_at, spent = time.monotonic(), False
    planned = faults.plan(config.chaos, config.train.steps, len(group.workers))
    saves = Saves(max(rundir.committed(report.folder), default=0))
    pipeline = Pipeline(config, group, report, report.facts.step, saves)
    attaching: Attaching | None = fleets.request_memory(
        fleet, group, opened, 0.0 if report.facts.fresh else fleets.PATIENCE_S
    )
    pipelines.send_due(pipeline)
    while True:
        # A run that begins makes its first step before anything else.
        if attaching and (pipeline.sent or not report.facts.fresh) and attaching.ready():
            pipelines.send_keep(pipeline, attaching, opened)
            attaching = None
        if time.monotonic() - looked_at > LOOK_EVERY_S:
            left, looked_at = fleets.reason_to_leave(fleet), time.monotonic()
            spent = stop_spending(report)
        left = Exit.STOPPED if interrupt.asked() or spent else pipeline.notice or left
        goes_on = pipeline.step < config.train.steps and not left and not pipeline.halted
        if goes_on and pipelines.windows(pipeline) < WINDOWS_IN_FLIGHT:
            pipelines.send_window(pipeline)
            if pipeline.saving:
                chaos.strike(planned, "save", group, fleet, report)
                pipeline.saving = False
            continue
        if not pipeline.sent:
            break
        pipelines.take(pipeline)
        if pipeline.halted and not pipeline.sent:
            rewind.rewind(pipeline, opened, fleet)
        chaos.strike(planned, "step", group, fleet, report)
        if pipeline.step_s and not attaching:
            fleets.start_spares(fleet)
    report.phase("save", f"saving step {pipeline.step}")
    pipelines.save_last(pipeline, patient=left in (None, Exit.STOPPED) or pipeline.step == config.train.steps)
    return Exit.FINISHED if pipeline.step == config.train.steps else left or Exit.STOPPED


def stop_spending(report: Report) -> bool:
    """Whether the run has had its chip-hours; says so."""
    if not report.is_spent():
        return False
    limit = report.config.cluster.max_chip_hours
    said = f"cluster.max_chip_hours={limit:g}: used up, {report.chip_hours():.2f}; a resumed run needs a larger one"
    report.event("spent", reason=said)
    report.screen.say(said)
    return True
