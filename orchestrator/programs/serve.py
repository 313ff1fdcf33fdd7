"""Serving weights, on hosts that stand ready: clients' requests come in by the router, and plans go down.

Hosts may die and others come: the router keeps every request with the tokens it has, and the new hosts go on with it.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gemma.batching import schedule
from gemma.batching.plans import Answer
from gemma.batching.schedule import Batch
from gemma.config import Serve
from orchestrator.chaos import chaos, faults
from orchestrator.config import Config
from orchestrator.exit import Exit
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts import group as hosts
from orchestrator.hosts.ready import Demand, Load, ReadyHosts, Work
from orchestrator.programs import pipeline as pipelines
from orchestrator.programs.pipeline import Pipeline
from orchestrator.record import rundir
from orchestrator.record.report import Report
from orchestrator.recovery import recover
from orchestrator.recovery.outcome import Evidence
from orchestrator.serving import front
from orchestrator.serving import router as routers
from orchestrator.serving.router import Measured, Replica, Router

PLANS_UNDER_WAY = 2
STEP_S = 0.05  # of decoding in a plan, at most: tokens come to clients so often
MOST_STEPS = 16  # of decoding in a plan
IDLE_S = 0.1
FOLLOW_S = 2.0
ROW_EVERY_S = 1.0  # a line of metrics.jsonl


@contextmanager
def serving(config: Config, report: Report) -> Iterator[tuple[Work, Demand]]:
    """HTTP is answered from here on; what needs hosts waits for them, or is refused."""
    assert config.serve is not None
    router = Router(config.serve.queue)
    with front.served(config, router) as address:
        report.event("listen", address=address)
        report.screen.say(f"serving {config.serve.name} at {address}/v1")
        try:
            yield partial(serve, router), partial(demanded, router, report, Rows())
        finally:
            routers.give_up(router, "the server has stopped")


def serve(router: Router, ready: ReadyHosts) -> Exit | Evidence:
    """On one replica, until the user ends it, then until what runs is done. Raises HostsFailedError."""
    report, group, serve = ready.report, ready.group, ready.config.serve
    assert serve is not None
    step = newest(serve, None)
    facts = recover.stand_at(ready, [(step,)] * len(group.workers), None)
    planned = faults.plan(ready.config.chaos, 2**31, len(group.workers))
    router.step, replica = step, routers.open_replica(router, facts.limits)
    pipeline, state = Pipeline(ready, report.newest), Serving(report, replica, step)
    try:
        while (left := reason_to_leave(router, pipeline, state)) is None:
            routers.take(router, replica)
            if serve.follow and state.is_time_to_look() and (step := newest(serve, state.served)) != state.served:
                move_to(router, pipeline, state, step)
            if len(state.steps) < PLANS_UNDER_WAY and send_plan(pipeline, state):
                continue
            send_last(pipeline, state)
            if pipeline.sent:
                receive(router, pipeline, state)
                chaos.strike(planned, "step", group, ready.fleet, report)
                fleets.start_spares(ready.fleet)
            else:
                replica.arrived.wait(IDLE_S)
            state.rows.write(report, router, replica.batches[:1], replica.measured)
        return left
    finally:
        routers.close_replica(router, replica)


def demanded(router: Router, report: Report, rows: "Rows") -> Load:
    """What all replicas have to do; now and then a line of the server's own metrics.jsonl."""
    with router.lock:
        batches = [replica.batches[routers.SERVED] for replica in router.replicas]
        waiting = len(router.waiting[routers.SERVED])
        report.newest += router.measured.plans
        router.measured.plans = 0
        rows.write(report, router, batches, router.measured)
        running, slots = sum(len(batch.running) for batch in batches), sum(batch.limits.slots for batch in batches)
    return Load(running, waiting + sum(len(batch.waiting) for batch in batches), slots, len(batches))


def newest(serve: Serve, served: int | None) -> int | None:
    """The step to serve: one that is served stays until there is a later one, also where its run is gone."""
    if not serve.follow:
        return serve.step
    steps = [*rundir.committed(Path(serve.checkpoint).expanduser()), *([] if served is None else [served])]
    return max(steps, default=None)


def move_to(router: Router, pipeline: Pipeline, state: "Serving", step: int | None) -> None:
    """Newer weights, once what was sent is answered. Requests go on: nobody is told."""
    while state.steps:
        if not pipeline.sent:
            send_last(pipeline, state)
        receive(router, pipeline, state)
    ready = pipeline.ready
    arguments = [(step,)] * len(ready.group.workers)
    hosts.collect(hosts.call_each(ready.group, ready.config.timeout.restore_s, "restore", arguments))
    router.step = state.served = step
    routers.restart_replica(router, state.replica)
    ready.report.event("follow", pipeline.step, served=step)
    ready.report.screen.say(f"serving step {step}")


class Serving:
    """What this attempt has under way, and has measured."""

    def __init__(self, report: Report, replica: Replica, served: int | None):
        self.report, self.replica, self.served = report, replica, served
        self.steps: deque[int] = deque()  # decode steps of each plan under way
        self.unasked = False  # the newest plan's answer comes with the next one, and none has been sent
        self.step_s = 0.0
        self.rows = Rows()
        self.looked = time.monotonic()

    def is_time_to_look(self) -> bool:
        """For a newer checkpoint."""
        if time.monotonic() - self.looked < FOLLOW_S:
            return False
        self.looked = time.monotonic()
        return True


class Rows:
    """Lines of metrics.jsonl, now and then: of a replica, or of all together."""

    def __init__(self) -> None:
        self.written = time.monotonic()

    def write(self, report: Report, router: Router, batches: Sequence[Batch], measured: Measured) -> None:
        now = time.monotonic()
        if now - self.written < ROW_EVERY_S:
            return
        routers.show(router)
        running, tokens_per_s = sum(len(batch.running) for batch in batches), measured.tokens / (now - self.written)
        waits = {"first_token_s": measured.first_s, "between_tokens_s": measured.between_s}
        latencies = {name: statistics.median(seconds) for name, seconds in waits.items() if seconds}
        self.written = now
        measured.clear()
        if tokens_per_s == 0 and not running:
            return
        report.served(
            running=running,
            waiting=len(router.waiting[routers.SERVED]) + sum(len(batch.waiting) for batch in batches),
            tokens_per_s=tokens_per_s,
            cache_used=routers.cache_used(batches),
            put_back=sum(batch.put_back for batch in batches),
            tokens=router.tokens,
            replicas=len(router.replicas),
            **latencies,
        )


def send_plan(pipeline: Pipeline, state: Serving) -> bool:
    """Whether there was something to do."""
    timeout = pipeline.ready.config.timeout
    steps = max(1, min(MOST_STEPS, int(STEP_S / state.step_s) if state.step_s else 1))
    plans = [schedule.plan(batch, steps, batch.limits.chunks[-1]) for batch in state.replica.batches]
    if all(plan.empty for plan in plans):
        return False
    pipeline.step += 1
    state.steps.append(plans[routers.SERVED].steps)
    state.unasked = True
    pipelines.send(pipeline, "step", timeout.step_s if not state.step_s else max(timeout.hang_s, 1.0), *plans)
    return True


def send_last(pipeline: Pipeline, state: Serving) -> None:
    """Asks for the newest plan's answer, where there is no plan to come that would bring it."""
    if state.unasked and len(state.steps) < PLANS_UNDER_WAY:
        timeout = pipeline.ready.config.timeout
        state.unasked = False
        pipelines.send(pipeline, "last", timeout.step_s if not state.step_s else max(timeout.hang_s, 1.0))


def receive(router: Router, pipeline: Pipeline, state: Serving) -> None:
    """The oldest verb's answer, to the clients."""
    _, results = pipelines.receive(pipeline)
    answers: tuple[Answer, ...] | None = results[0].value
    if answers is None:
        return
    answer = answers[routers.SERVED]
    if steps := state.steps.popleft():
        state.step_s = 0.5 * (state.step_s or answer.seconds / steps) + 0.5 * answer.seconds / steps
    state.report.newest = pipeline.step
    for batch, one in zip(state.replica.batches, answers, strict=True):
        routers.deliver(router, state.replica, schedule.take_answer(batch, one))


def reason_to_leave(router: Router, pipeline: Pipeline, state: Serving) -> Exit | Evidence | None:
    """A user who ends the server is obeyed once what runs is done, or serve.drain_s is over; so is the end of one
    replica, of which there are too many.
    """
    left, replica = pipelines.reason_to_leave(pipeline), state.replica
    if left is not Exit.STOPPED:
        return left
    config = pipeline.ready.config
    assert config.serve is not None
    if not replica.draining:
        replica.draining, replica.drain_until = True, time.monotonic() + config.serve.drain_s
        pipeline.ready.report.screen.say("draining: what runs is finished, nothing new is taken")
    done = routers.is_done(router, replica) and not state.steps
    return Exit.STOPPED if done or time.monotonic() > replica.drain_until else None
