"""The run, top to bottom: one process drives every host until the last step is done or given up."""

import os
import shutil
import time
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gemma.config import ConfigError
from gemma.reports import Restored
from orchestrator import group as hosts
from orchestrator import placement, rundir, slices
from orchestrator.config import Config
from orchestrator.exit import HOW, Exit
from orchestrator.group import Call, Group, HostsFailedError
from orchestrator.interrupt import Interrupt, StoppedError
from orchestrator.outcome import Evidence, Outcome, classify
from orchestrator.policy import Failure, GiveUp, decide
from orchestrator.progress import summary
from orchestrator.report import Report
from orchestrator.window import due, window_end

WINDOWS_IN_FLIGHT = 2
SLOWDOWN = 5  # a window this many times slower than the last is not taken for a hang


@dataclass(frozen=True)
class Sent:
    """Something in flight: a window of steps, or what stands at its end."""

    kind: str  # run, evaluate, save
    step: int  # the step it ends at
    call: Call


def run(config: Config, folder: Path, lock: IO[str], interrupt: Interrupt, commanded: float) -> Exit:
    """Works on a run whose directory and manifest exist. Raises ConfigError, and then leaves no fresh run behind.

    lock: of the directory, let go at the end. commanded: the time.monotonic() at which the user asked, from which
    the first step is counted.
    """
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
        story.write_text(traceback.format_exc())
        report.event("give_up", story=str(story))
        report.screen.say(f"the controller failed: {traceback.format_exc().splitlines()[-1]} ({story})")
        code = Exit.GAVE_UP
    interrupt.closing = True
    goodput = report.close()
    root = "" if config.run.root == "runs" else f" run.root={config.run.root}"
    more = f" train.steps={2 * config.train.steps}" if code is Exit.FINISHED else ""
    command = f"python -m launch.resume run={folder.name}{root}{more}"
    print(summary(folder, HOW[code], rundir.metrics(folder), goodput, report.first_step_s, command), flush=True)
    lock.close()
    return code


def drive(config: Config, folder: Path, report: Report, interrupt: Interrupt) -> Exit:
    """Trains until the last step. Raises ConfigError for the user's mistakes that only a host can see."""
    history: list[Failure] = []
    predecessors: dict[str, int] = {}
    report.phase("reserve", "starting the cluster")
    with slices.connect(config):
        while True:
            report.begin_attempt()
            group = None
            try:
                report.phase("reserve", "reserving slices")
                spots = placement.reserve(config, interrupt.asked)
                report.event("reserve", hosts=[spot.ip for spot in spots.spots])
                report.phase("start", "starting hosts")
                group = hosts.spawn(config, spots, folder, report.attempt, predecessors)
                started = time.monotonic()
                group = hosts.join(group, config, interrupt.asked)
                report.event("start", duration_s=time.monotonic() - started, pids=list(group.pids))
                start(config, folder, group, report, interrupt, started)
                done = train(config, folder, group, report, interrupt)
                report.event("finish" if done else "stop")
                return Exit.FINISHED if done else Exit.STOPPED
            except StoppedError as stopped:
                report.event("stop", waiting_for=str(stopped))
                return Exit.STOPPED
            except HostsFailedError as failed:
                report.phase("down", "a host failed")
                history.append(understand(folder, failed.evidence, report))
                decision = decide(history, config.retry.budget)
                report.event("decision", decision=type(decision).__name__, reason=decision.reason)
                if isinstance(decision, GiveUp):
                    report.screen.say(f"gave up: {decision.reason}; the full story is in {folder / 'logs'}")
                    return Exit.GAVE_UP
                report.ledger.restarts += 1
                report.screen.say(f"restarting: {decision.reason}")
            except TimeoutError as late:
                report.event("give_up", reason=str(late))
                report.screen.say(f"gave up: {late}")
                return Exit.GAVE_UP
            finally:
                if group:
                    predecessors |= group.by_node
                    hosts.stop(group)
                    placement.release(group.placement)
                report.write_goodput(now=True)


def start(config: Config, folder: Path, group: Group, report: Report, interrupt: Interrupt, started: float) -> None:
    """Brings the hosts to the newest committed step, or to the beginning where none was ever committed."""
    report.phase("start", "loading data and compiling")
    hosts.collect(hosts.open_trainers(group, config, folder), interrupt.asked)
    step = newest_checkpoint(folder)
    report.phase("start", "initialising" if step is None else f"restoring step {step}")
    restored: list[Restored] = hosts.collect(
        hosts.call(group, config.timeout.restore_s, "restore", step), interrupt.asked
    )
    same_text(folder, {answer.fingerprint for answer in restored}, config.resume.allow_data_change)
    report.phase("step", "training")
    report.ready(restored[0], time.monotonic() - started)


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
    """The step to go on from. Fails closed: what was committed once must still be there.

    Hosts run ahead of the controller: where it died, a checkpoint may lie beyond the last step it wrote down. An
    earlier one is taken then, so that every step has its line; the steps done again are the same to the bit.
    """
    found = rundir.committed(folder)
    announced = [event["step"] for event in rundir.events(folder) if event["event"] == "commit"]
    if announced and (not found or found[-1] < max(announced)):
        missing = folder / "checkpoints" / str(max(announced))
        message = f"{missing} was committed and is gone; the run does not start afresh by itself"
        raise HostsFailedError([Evidence(0, exception="CheckpointError", message=message)])
    reported = max(rundir.metrics(folder), default=0)
    return max([step for step in found if step <= reported] or found, default=None)


def train(config: Config, folder: Path, group: Group, report: Report, interrupt: Interrupt) -> bool:
    """Keeps two windows in flight until the last step; True when done, False when stopped and saved."""
    assert report.facts is not None
    step, end = report.facts.step, config.train.steps
    saved, saved_at = step, time.monotonic()
    pending: set[int] = set()  # saved, not yet seen committed
    flight: deque[Sent] = deque()
    step_s: float | None = None
    timeout = config.timeout
    while True:
        running = sum(sent.kind == "run" for sent in flight)
        if running < WINDOWS_IN_FLIGHT and step < end and not interrupt.asked():
            first, step = step, window_end(step, end, step_s, (config.checkpoint.every, config.eval.every))
            wait_s = timeout.step_s + SLOWDOWN * (step_s or 0.0) * (step - first)
            flight.append(Sent("run", step, hosts.call(group, wait_s, "run", first, step)))
            if config.eval.every and due(step, end, config.eval.every):
                flight.append(Sent("evaluate", step, hosts.call(group, timeout.compile_s + timeout.step_s, "evaluate")))
            minutes = (time.monotonic() - saved_at) / 60
            if due(step, end, config.checkpoint.every) or 0 < config.checkpoint.every_minutes <= minutes:
                flight.append(Sent("save", step, hosts.call(group, timeout.save_s, "save", step)))
                saved, saved_at = step, time.monotonic()
            continue
        if not flight:
            break
        step_s = take(flight.popleft(), report, pending) or step_s
        announce(folder, report, pending)
    report.phase("save", f"saving step {step}")
    if step > saved:
        take(Sent("save", step, hosts.call(group, timeout.save_s, "save", step)), report, pending)
    hosts.collect(hosts.call(group, timeout.save_s, "wait"))
    announce(folder, report, pending)
    return step == end


def take(sent: Sent, report: Report, pending: set[int]) -> float | None:
    """Waits for the oldest call in flight and writes down what came; returns a step's seconds where it tells."""
    result = hosts.collect(sent.call)[0]
    if sent.kind == "run":
        report.rows(result)
        times = sorted(row.step_s for row in result)
        return times[len(times) // 2]
    if sent.kind == "evaluate":
        report.evaluated(sent.step, *result)
    else:
        report.saved(sent.step, result)
        pending.add(sent.step)
    return None


def announce(folder: Path, report: Report, pending: set[int]) -> None:
    """Only a commit is announced: a save that is whole on disk."""
    if not pending:
        return
    for step in sorted(pending.intersection(rundir.committed(folder))):
        report.event("commit", step)
        pending.discard(step)


def understand(folder: Path, evidence: tuple[Evidence, ...], report: Report) -> Failure:
    """Classifies a failure and writes its full story to a file. Raises ConfigError for the user's own mistakes."""
    outcome, cause = classify(evidence)
    if outcome is Outcome.BAD_INPUT:
        raise ConfigError(cause.message)
    path = folder / "logs" / f"attempt-{report.attempt}-failure.txt"
    story = [f"{outcome.value}: rank {cause.rank} at step {report.step}", ""]
    for item in evidence:
        story += [f"rank {item.rank}: {item}", item.traceback, ""]
    path.write_text("\n".join(story))
    said = cause.overdue or f"{cause.exception or ''} {cause.message}".strip()
    report.event("failure", outcome=outcome.value, rank=cause.rank, evidence=said[:500], story=str(path))
    report.screen.say(f"{outcome.value}: rank {cause.rank} at step {report.step}: {said[:200]} ({path})")
    frames = [line.strip() for line in cause.traceback.splitlines() if line.lstrip().startswith("File ")]
    signature = " | ".join([outcome.value, cause.exception or "", *frames[-1:]])
    committed = rundir.committed(folder)
    return Failure(outcome, signature, report.step, committed[-1] if committed else None)
