"""The run, top to bottom: one process drives every host until the work is done or given up."""

import contextlib
import gc
import os
import shutil
import time
import traceback
from contextlib import AbstractContextManager
from functools import partial
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
from orchestrator.hosts.ready import Demand, ReadyHosts, Work
from orchestrator.interrupt import Interrupt, StoppedError
from orchestrator.programs import replicas
from orchestrator.programs.evaluate import evaluate, evaluated
from orchestrator.programs.pipeline import stop_spending
from orchestrator.programs.train import asked_too, train
from orchestrator.record import rundir
from orchestrator.record.progress import evaluation_results, summary, training_results
from orchestrator.record.report import Report, resume_command
from orchestrator.recovery import checkpoints, recover
from orchestrator.recovery.policy import Failure, GiveUp, decide
from orchestrator.slices import providers
from orchestrator.slices.upkeep import NoSlicesError

WAITED_IN_VAIN = (StoppedError, TimeoutError, NoSlicesError)


def run(config: Config, folder: Path, lock: IO[str], interrupt: Interrupt, commanded: float) -> Exit:
    """Works on a run whose directory and manifest exist. Raises ConfigError, and then leaves no fresh run behind.

    lock: of the directory, let go at the end. commanded: the time.monotonic() at which the user asked, from which
    the first step is counted.
    """
    gc.freeze()  # imported modules are never freed: the collector need not scan them
    report = Report(config, folder, commanded)
    try:
        with program_of(config, folder, report) as (work, demand):
            code = run_on_cluster(config, folder, report, interrupt, work, demand)
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
    trained = code is Exit.FINISHED and config.evaluate is None and config.serve is None
    command = going_on(config, folder, f" train.steps={2 * config.train.steps}" if trained else "")
    extending = change.extending(config.optim, config.train.steps) if trained else None
    with contextlib.suppress(OSError):  # a full disk, or nobody who reads
        found = results(config, folder)
        print(summary(folder, HOW[code], found, goodput, report.first_step_s, command, extending), flush=True)
    lock.close()
    return code


def program_of(config: Config, folder: Path, report: Report) -> AbstractContextManager[tuple[Work, Demand | None]]:
    """What is done on the hosts; and how much there is to do, where it is a server."""
    if config.serve is not None:
        from orchestrator.programs.serve import serving  # FastAPI: half a second that no other run pays

        return serving(config, report)
    if config.asks:
        from orchestrator.programs.suite import asking  # lm-eval: seconds

        return asking(config, folder, report)
    if config.evaluate is None and config.eval.tasks:
        return asked_too(config, folder, report)
    return contextlib.nullcontext((evaluate if config.evaluate else train, None))


def going_on(config: Config, folder: Path, more: str) -> str:
    """The command that resumes the run, or why none can."""
    try:
        if config.evaluate is None and config.serve is None:
            checkpoints.resumable(folder)
    except ConfigError as error:
        return f"none: {error}"
    return resume_command(config, folder, more)


def results(config: Config, folder: Path) -> list[str]:
    rows = rundir.metrics(folder)
    if config.serve is not None:
        return []
    if config.asks:
        from orchestrator.evaluation import results as found

        return found.lines(folder)
    return evaluation_results(evaluated(folder), rows) if config.evaluate else training_results(rows)


def run_on_cluster(
    config: Config, folder: Path, report: Report, interrupt: Interrupt, work: Work, demand: Demand | None
) -> Exit:
    """Gets slices and gives them back. Raises ConfigError for the user's mistakes that only a host can see."""
    if stop_spending(report):
        return Exit.STOPPED
    report.phase("reserve", "starting the cluster")
    try:
        with providers.connect(configs.leased(config), report.provided, interrupt.asked) as lease:
            interrupt.check = lease.check_head
            if demand is not None and config.replicas > 1:
                return replicas.run(config, folder, lease, report, interrupt, demand, partial(run_attempts, work=work))
            with fleets.managed(config, folder, lease) as fleet:
                return run_attempts(config, folder, fleet, report, interrupt, work)
    except WAITED_IN_VAIN as early:
        return left_waiting(early, report)
    finally:
        interrupt.check = lambda: None


def run_attempts(config: Config, folder: Path, fleet: Fleet, report: Report, interrupt: Interrupt, work: Work) -> Exit:
    """Does the work on hosts that stand ready, again and again until it is done."""
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
            opened = open_programs(now, folder, group, fleet, report, interrupt)
            left = work(ReadyHosts(now, folder, group, opened, fleet, report, interrupt, started))
            if isinstance(left, Exit):
                report.event("finish" if left is Exit.FINISHED else "stop")
                fleet.needed = False
                return left
            history.append(recover.record_move(left, fleet, report))
            report.decided(decide(history, config.retry.budget))
        except WAITED_IN_VAIN as early:
            return left_waiting(early, report)  # told before the slices are given back
        except HostsFailedError as failed:
            report.phase("down", "a host failed")
            assert group is not None
            fleet.lease.check_head()
            history.append(recover.diagnose(folder, failed, group, fleet, report))
            decision = decide(history, config.retry.budget)
            report.decided(decision)
            if isinstance(decision, GiveUp):
                return Exit.GAVE_UP
        finally:
            if group:
                fleets.kill(fleet, group)
            report.write_goodput(now=True)


def open_programs(
    config: Config, folder: Path, group: Group, fleet: Fleet, report: Report, interrupt: Interrupt
) -> list[Opened]:
    """Every host's program, with its data and what it compiles."""
    if config.serve is None and not config.asks:
        report.phase("start", "reading the text")
        hosts.collect(hosts.tokenise(group, config), interrupt.asked)
    report.phase("start", "compiling")
    call = hosts.open_programs(group, config, folder)
    planned = faults.plan(config.chaos, config.train.steps, len(group.workers))
    chaos.strike(planned, "compile", group, fleet, report)
    return hosts.collect(call, interrupt.asked)


def left_waiting(early: Exception, report: Report) -> Exit:
    """The run ends while it waits for slices or hosts: the user asked for that, or they do not come."""
    if isinstance(early, StoppedError):
        report.event("stop", waiting_for=str(early))
        return Exit.STOPPED
    report.event("give_up", reason=str(early))
    report.screen.say(f"gave up: {early}")
    return Exit.GAVE_UP
