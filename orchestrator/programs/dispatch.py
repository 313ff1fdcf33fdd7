"""What training sends to its hosts, window by window, and what it does with their answers."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray.exceptions import RayError

from gemma.messages import BadStep, SaveBegun, WindowResult
from orchestrator.hosts import memory
from orchestrator.hosts.group import HostsFailedError
from orchestrator.hosts.memory import Attaching
from orchestrator.hosts.ready import ReadyHosts
from orchestrator.programs import pipeline as pipelines
from orchestrator.programs import saves
from orchestrator.programs.pipeline import Pipeline
from orchestrator.programs.rewind import Stop, over_budget, since_last_good
from orchestrator.programs.saves import Saves
from orchestrator.programs.window import deadline_of, due, learn, snapshot_every
from orchestrator.record import rundir
from orchestrator.recovery.outcome import Evidence

if TYPE_CHECKING:
    from orchestrator.evaluation.in_loop import Asking

ANSWER_S = 60.0  # for a host to say that its save is not done in time
LOOK_S = 0.5  # for a save that hosts call done to be seen here


@dataclass
class Training:
    """What the controller knows of one attempt at training."""

    ready: ReadyHosts
    pipeline: Pipeline
    saves: Saves
    saving: bool = False  # a save was just sent
    prepared: bool = False  # the hosts have been told to compile what an evaluation runs
    halted: bool = False  # the hosts must be brought back to an earlier step
    bad: list[BadStep] = field(default_factory=list)  # bad steps since the hosts last stood at a restored step
    pack_s: float = 0.0  # device time of one snapshot
    wait_s: float = 0.0  # that hosts wait for one while devices have nothing to do
    asking: "Asking | None" = None  # requests that go with each evaluation
    snapshots: bool = False  # the hosts are attached to memory that outlives their processes


def send_steps(training: Training) -> None:
    """The next window of steps, and what is due after them."""
    config, report = training.ready.config, training.ready.report
    stops = (config.checkpoint.every, config.eval.every)
    pipelines.send_window(training.pipeline, config.train.steps, stops, report.newest, snapshot_interval(training))
    send_due(training)


def send_due(training: Training) -> None:
    """Sends the evaluation or save due at this step, or that an earlier attempt did not reach."""
    config, report, pipeline = training.ready.config, training.ready.report, training.pipeline
    step, timeout = pipeline.step, config.timeout
    if step == 0:
        return
    if config.eval.every and due(step, config.train.steps, config.eval.every) and step > report.evaluated_step:
        if not training.prepared:
            pipelines.send(pipeline, "prepare", timeout.compile_s)
            training.prepared = True
            if training.asking:
                pipelines.send(pipeline, "prepare_asking", timeout.compile_s, training.asking.digest)
        if training.asking:  # before the evaluation, which is what says that this step's is done
            wait_s = deadline_of(pipeline.pace, "ask", timeout.compile_s, timeout.hang_s, 1)
            pipelines.send(pipeline, "ask", wait_s, training.asking.steps)
        wait_s = deadline_of(pipeline.pace, "evaluate", timeout.step_s, timeout.hang_s, 1)
        pipelines.send(pipeline, "evaluate", wait_s, step)
    now, begun = time.monotonic(), training.saves
    minutes = (now - begun.begun_at) / 60
    late = 0 < config.checkpoint.every <= step - begun.newest or 0 < config.checkpoint.every_minutes <= minutes
    wanted = late or due(step, config.train.steps, config.checkpoint.every)
    if begun.failures:  # one try at a time
        wanted = now >= begun.again_at and not begun.uncommitted and all(sent.verb != "save" for sent in pipeline.sent)
    if step > begun.newest and wanted:
        send_save(training)


def send_save(training: Training) -> None:
    pipelines.send(training.pipeline, "save", training.ready.config.timeout.save_s, training.pipeline.step)
    training.saving = True
    saves.note_begun(training.saves, training.pipeline.step)


def send_keep(training: Training, attaching: Attaching) -> None:
    """From here on the hosts take snapshots; not if a keeper has died since, which the next attempt replaces."""
    ready = training.ready
    timeout, report = ready.config.timeout, ready.report
    if ready.config.checkpoint.snapshot == "off":
        return
    slices = [spot.slice_name for spot in ready.group.placement.spots]
    try:
        arguments = memory.keep_arguments(attaching, [one.share_key for one in ready.opened], slices, report.attempt)
    except RayError as error:
        why = getattr(error, "cause", None) or str(error).splitlines()[0]
        report.screen.say(f"no snapshots until the next restart: {why}")
        return
    pipelines.send_each(training.pipeline, "keep", timeout.compile_s + timeout.step_s, arguments)
    training.snapshots = True


def snapshot_interval(training: Training) -> int:
    """Steps from snapshot to snapshot; 0 is none."""
    checkpoint = training.ready.config.checkpoint
    if not training.snapshots or checkpoint.snapshot == "off":
        return 0
    if isinstance(checkpoint.snapshot, int):
        return checkpoint.snapshot
    step_s = training.pipeline.pace.usual.get("run", 1.0)
    return snapshot_every(training.pack_s + training.wait_s, step_s, checkpoint.snapshot_cost)


def receive(training: Training) -> None:
    """Waits for the oldest verb in flight and writes down what came. Raises HostsFailedError."""
    pipeline, report = training.pipeline, training.ready.report
    sent, results = pipelines.receive(pipeline)
    if training.halted:
        return  # sent before that was known
    result = results[0].value
    waiting = [other.step for other in (sent, *pipeline.sent) if other.verb == "save"]
    if sent.verb == "run":
        receive_steps(training, result)
    elif sent.verb in ("prepare", "prepare_asking"):
        report.ledger.move("step", "compile", result)
    elif sent.verb == "ask":
        assert training.asking is not None
        from orchestrator.evaluation import in_loop  # lm-eval, which was imported to make the requests

        seconds, found = result
        learn(pipeline.pace, "ask", [seconds])
        report.asked(sent.step, in_loop.values(training.asking, found), seconds)
    elif sent.verb == "evaluate":
        learn(pipeline.pace, "evaluate", [result.seconds])
        report.evaluated(result)
    elif sent.verb == "keep":
        training.pack_s = result.pack_s
        report.ledger.move("step", "snapshot", result.seconds)
        every = snapshot_interval(training)
        report.event("keep", sent.step, result.seconds, every=every, pack_s=round(result.pack_s, 6))
    elif sent.verb == "save":
        waiting = waiting[1:]
        receive_save(training, sent.step, result, waiting)
    saves.note_failures(training.saves, report, [one.trouble for one in results], waiting)
    saves.announce_commits(training.saves, report, waiting, training.ready.config.timeout.save_s)


def receive_steps(training: Training, ran: WindowResult) -> None:
    report = training.ready.report
    report.rows(ran.rows)
    for bad in ran.bad:
        report.bad(bad)
    training.bad += ran.bad
    training.halted = ran.halted
    if training.bad and not ran.halted and (stop := over_budget(training.ready.config.guard, report.bad_steps)):
        raise diverged(training, stop)
    if not ran.rows:
        return
    report.ledger.move("step", "data", ran.data_s)
    if ran.snapshots:
        training.wait_s = ran.wait_s / ran.snapshots
        report.ledger.move("step", "snapshot", ran.snapshots * (training.pack_s + training.wait_s))


def diverged(training: Training, stop: Stop) -> HostsFailedError:
    """The error that stops the run: names the first of the last consecutive bad steps."""
    bad = since_last_good(training.bad)
    message = f"{stop.reason}; step {bad.step} trained on rows {list(bad.ids)} of the corpus"
    return HostsFailedError([Evidence(0, exception="Diverged", message=message)])


def receive_save(training: Training, step: int, saved: SaveBegun, on_the_way: list[int]) -> None:
    """The save has begun, or cannot now."""
    report = training.ready.report
    if saved.problem is None:
        report.saved(step, saved.seconds)
        training.saves.uncommitted[step] = time.monotonic()
    else:
        report.ledger.move("step", "save", saved.seconds)
        saves.fail(training.saves, report, step, saved.problem, on_the_way)


def save_last(training: Training, patient: bool) -> None:
    """Saves where the hosts stand, and waits until that is whole on disk.

    A save that fails is tried again until timeout.save_s have passed; then raises TimeoutError. patient: else it is
    tried once, for a run that goes on elsewhere, from memory or from an older step.
    """
    begun, save_s = training.saves, training.ready.config.timeout.save_s
    step = training.pipeline.step
    deadline = time.monotonic() + save_s
    begun.until = deadline
    begun.meanwhile = f"tried for {save_s:g} s at most (timeout.save_s)"
    while True:
        if step > begun.newest:
            send_save(training)
            receive(training)
        left_s = max(0.0, deadline - time.monotonic())
        pipelines.send(training.pipeline, "wait", left_s + ANSWER_S, left_s)
        receive(training)
        if (step <= begun.newest and not begun.uncommitted) or not patient:
            return
        left_s = deadline - time.monotonic()
        if left_s <= LOOK_S:
            newest = max(rundir.committed(training.ready.folder), default=0)
            kept = f"step {newest} is the newest on disk" if newest else "nothing is on disk"
            why = begun.problem if begun.failures else "not whole on disk"
            raise TimeoutError(f"step {step} was not saved within timeout.save_s={save_s:g} ({why}); {kept}")
        time.sleep(min(left_s, max(LOOK_S, begun.again_at - time.monotonic())))
