"""What is on its way through the hosts: windows of steps, and what stands at their ends; taken in the order sent."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from gemma.messages import Bad, Opened, Ran, Saved
from orchestrator.config import Config
from orchestrator.hosts import group as hosts
from orchestrator.hosts import memory
from orchestrator.hosts.group import Call, Group
from orchestrator.hosts.memory import Attaching
from orchestrator.programs import saves
from orchestrator.programs.saves import Saves
from orchestrator.programs.window import deadline_s, due, snapshot_every, window_end
from orchestrator.record import rundir
from orchestrator.record.report import Report
from orchestrator.recovery.outcome import Evidence

ANSWER_S = 60.0  # for a host to say that its save is not done in time
LOOK_S = 0.5  # for a save that hosts call done to be seen here


@dataclass(frozen=True)
class Sent:
    """A verb in flight."""

    verb: str
    step: int  # that the hosts stand at once it is done
    call: Call


@dataclass
class Pipeline:
    """Of one attempt."""

    config: Config
    group: Group
    report: Report
    step: int  # sent so far
    saves: Saves
    sent: deque[Sent] = field(default_factory=deque)
    saving: bool = False  # a save was just sent
    halted: bool = False  # the hosts must be brought back to an earlier step
    bad: Bad | None = None  # the first of the bad steps that halted them
    notice: Evidence | None = None  # a host is about to be taken away
    step_s: float | None = None  # a step's usual seconds
    longest_s: float | None = None
    pack_s: float = 0.0  # that the devices take for a snapshot
    wait_s: float = 0.0  # that hosts wait for one while devices have nothing to do
    snapshots: bool = False  # the hosts are attached to memory that outlives their processes


def windows(pipeline: Pipeline) -> int:
    return sum(sent.verb == "run" for sent in pipeline.sent)


def send(pipeline: Pipeline, verb: str, timeout_s: float, *args: Any) -> None:
    pipeline.sent.append(Sent(verb, pipeline.step, hosts.call(pipeline.group, timeout_s, verb, *args)))


def send_window(pipeline: Pipeline) -> None:
    """The next steps, and what is due after them."""
    config, first = pipeline.config, pipeline.step
    stops = (config.checkpoint.every, config.eval.every)
    pipeline.step = window_end(first, config.train.steps, pipeline.step_s, stops)
    timeout = config.timeout
    wait_s = deadline_s(timeout.step_s, timeout.hang_s, pipeline.longest_s, pipeline.step - first)
    send(pipeline, "run", wait_s, first, pipeline.step, pipeline.report.newest, every(pipeline))
    send_due(pipeline)


def send_due(pipeline: Pipeline) -> None:
    """An evaluation or a save that stands at this step, or that an earlier attempt did not come to."""
    config, step, timeout = pipeline.config, pipeline.step, pipeline.config.timeout
    if step == 0:
        return
    if config.eval.every and due(step, config.train.steps, config.eval.every) and step > pipeline.report.evaluated_step:
        send(pipeline, "evaluate", timeout.compile_s + timeout.step_s, step)
    now, begun = time.monotonic(), pipeline.saves
    minutes = (now - begun.begun_at) / 60
    late = 0 < config.checkpoint.every <= step - begun.newest or 0 < config.checkpoint.every_minutes <= minutes
    wanted = late or due(step, config.train.steps, config.checkpoint.every)
    if begun.failures:  # one try at a time
        wanted = now >= begun.again_at and not begun.uncommitted and all(sent.verb != "save" for sent in pipeline.sent)
    if step > begun.newest and wanted:
        send_save(pipeline)


def send_save(pipeline: Pipeline) -> None:
    send(pipeline, "save", pipeline.config.timeout.save_s, pipeline.step)
    pipeline.saving = True
    saves.sent(pipeline.saves, pipeline.step)


def send_keep(pipeline: Pipeline, attaching: Attaching, opened: Sequence[Opened]) -> None:
    """From here on the hosts take snapshots; not if a keeper has died since, which the next attempt replaces."""
    timeout, group = pipeline.config.timeout, pipeline.group
    if pipeline.config.checkpoint.snapshot == "off":
        return
    slices = [spot.slice_name for spot in group.placement.spots]
    try:
        arguments = memory.keep_arguments(attaching, [one.share_key for one in opened], slices, pipeline.report.attempt)
    except RayError as error:
        why = getattr(error, "cause", None) or str(error).splitlines()[0]
        pipeline.report.screen.say(f"no snapshots until the next restart: {why}")
        return
    call = hosts.call_each(group, timeout.compile_s + timeout.step_s, "keep", arguments)
    pipeline.sent.append(Sent("keep", pipeline.step, call))
    pipeline.snapshots = True


def every(pipeline: Pipeline) -> int:
    """Steps from snapshot to snapshot; 0 is none."""
    wanted = pipeline.config.checkpoint.snapshot
    if not pipeline.snapshots or wanted == "off":
        return 0
    if isinstance(wanted, int):
        return wanted
    return snapshot_every(
        pipeline.pack_s + pipeline.wait_s, pipeline.step_s or 1.0, pipeline.config.checkpoint.snapshot_cost
    )


def take(pipeline: Pipeline) -> None:
    """Waits for the oldest verb in flight and writes down what came. Raises HostsFailedError."""
    sent, report = pipeline.sent.popleft(), pipeline.report
    answers = hosts.collect(sent.call)
    if pipeline.halted:
        return  # sent before that was known: of no worth
    told = [Evidence(rank, notice=a.notice, time=time.time()) for rank, a in enumerate(answers) if a.notice]
    pipeline.notice = pipeline.notice or next(iter(told), None)
    result = answers[0].value
    waiting = [other.step for other in (sent, *pipeline.sent) if other.verb == "save"]
    if sent.verb == "run":
        take_window(pipeline, result)
    elif sent.verb == "evaluate":
        report.evaluated(result)
    elif sent.verb == "keep":
        pipeline.pack_s = result.pack_s
        report.ledger.move("step", "snapshot", result.seconds)
        report.event("keep", sent.step, result.seconds, every=every(pipeline), pack_s=round(result.pack_s, 6))
    elif sent.verb == "save":
        waiting = waiting[1:]
        take_save(pipeline, sent.step, result, waiting)
    saves.heard(pipeline.saves, report, [answer.trouble for answer in answers], waiting)
    saves.look(pipeline.saves, report, waiting, pipeline.config.timeout.save_s)


def take_window(pipeline: Pipeline, ran: Ran) -> None:
    pipeline.report.rows(ran.rows)
    for bad in ran.bad:
        pipeline.report.bad(bad)
        pipeline.bad = bad if pipeline.bad is None else pipeline.bad
    pipeline.halted = ran.halted
    if not ran.halted:
        pipeline.bad = None
    if not ran.rows:
        return
    times = sorted(row.step_s for row in ran.rows)
    pipeline.step_s = times[len(times) // 2]
    pipeline.longest_s = max(times[-1], pipeline.longest_s or 0.0)
    pipeline.report.ledger.move("step", "data", ran.data_s)
    if ran.snapshots:
        pipeline.wait_s = ran.wait_s / ran.snapshots
        pipeline.report.ledger.move("step", "snapshot", ran.snapshots * (pipeline.pack_s + pipeline.wait_s))


def take_save(pipeline: Pipeline, step: int, saved: Saved, on_the_way: Sequence[int]) -> None:
    """It has begun, or cannot be now."""
    if saved.problem is None:
        pipeline.report.saved(step, saved.seconds)
        pipeline.saves.uncommitted[step] = time.monotonic()
    else:
        pipeline.report.ledger.move("step", "save", saved.seconds)
        saves.fail(pipeline.saves, pipeline.report, step, saved.problem, on_the_way)


def save_last(pipeline: Pipeline, patient: bool) -> None:
    """Saves where the hosts stand, and waits until that is whole on disk.

    A save that fails is tried again until timeout.save_s have passed; then raises TimeoutError. patient: else it is
    tried once, for a run that goes on elsewhere, from memory or from an older step.
    """
    begun, save_s = pipeline.saves, pipeline.config.timeout.save_s
    deadline = time.monotonic() + save_s
    begun.until = deadline
    begun.meanwhile = f"tried for {save_s:g} s at most (timeout.save_s)"
    while True:
        if pipeline.step > begun.newest:
            send_save(pipeline)
            take(pipeline)
        left_s = max(0.0, deadline - time.monotonic())
        send(pipeline, "wait", left_s + ANSWER_S, left_s)
        take(pipeline)
        if (pipeline.step <= begun.newest and not begun.uncommitted) or not patient:
            return
        left_s = deadline - time.monotonic()
        if left_s <= LOOK_S:
            newest = max(rundir.committed(pipeline.report.folder), default=0)
            kept = f"step {newest} is the newest on disk" if newest else "nothing is on disk"
            why = begun.problem if begun.failures else "not whole on disk"
            raise TimeoutError(f"step {pipeline.step} was not saved within timeout.save_s={save_s:g} ({why}); {kept}")
        time.sleep(min(left_s, max(LOOK_S, begun.again_at - time.monotonic())))
