"""Verbs on their way through the hosts: sent ahead, answered in the order sent, each with a deadline of its own."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.exit import Exit
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts import group as hosts
from orchestrator.hosts.group import Call
from orchestrator.hosts.ready import ReadyHosts
from orchestrator.hosts.worker import VerbResult
from orchestrator.programs.window import Pace, deadline_of, learn, window_end
from orchestrator.record.report import Report
from orchestrator.recovery.outcome import Evidence

WINDOWS_IN_FLIGHT = 2
LOOK_EVERY_S = 1.0  # at whether the hosts will stay


@dataclass(frozen=True)
class Sent:
    """A verb in flight."""

    verb: str
    step: int  # at which the hosts stand once it is done
    call: Call


@dataclass
class Pipeline:
    """Of one attempt."""

    ready: ReadyHosts
    step: int  # sent so far
    sent: deque[Sent] = field(default_factory=deque)
    pace: Pace = field(default_factory=Pace)
    notice: Evidence | None = None  # a host is about to be taken away
    leave: Exit | Evidence | None = None  # why to stop sending, as seen at looked_at
    looked_at: float = field(default_factory=time.monotonic)


def send(pipeline: Pipeline, verb: str, timeout_s: float, *args: Any) -> None:
    """The same to all hosts."""
    call = hosts.call(pipeline.ready.group, timeout_s, verb, *args)
    pipeline.sent.append(Sent(verb, pipeline.step, call))


def send_each(pipeline: Pipeline, verb: str, timeout_s: float, arguments: Sequence[tuple[Any, ...]]) -> None:
    """To each host its own arguments, in rank order."""
    call = hosts.call_each(pipeline.ready.group, timeout_s, verb, arguments)
    pipeline.sent.append(Sent(verb, pipeline.step, call))


def send_window(pipeline: Pipeline, end: int, stops: tuple[int, ...], *args: Any) -> None:
    """The next steps, up to `end` or a multiple of one of `stops` at most."""
    first, timeout = pipeline.step, pipeline.ready.config.timeout
    pipeline.step = window_end(first, end, pipeline.pace.usual.get("run"), stops)
    wait_s = deadline_of(pipeline.pace, "run", timeout.step_s, timeout.hang_s, pipeline.step - first)
    send(pipeline, "run", wait_s, first, pipeline.step, *args)


def has_room(pipeline: Pipeline) -> bool:
    """Whether another window may be sent."""
    return sum(sent.verb == "run" for sent in pipeline.sent) < WINDOWS_IN_FLIGHT


def receive(pipeline: Pipeline) -> tuple[Sent, list[VerbResult]]:
    """Waits for the oldest verb in flight: it, and every host's answer in rank order. Raises HostsFailedError."""
    sent = pipeline.sent.popleft()
    results: list[VerbResult] = hosts.collect(sent.call)
    told = [Evidence(rank, notice=r.notice, time=time.time()) for rank, r in enumerate(results) if r.notice]
    pipeline.notice = pipeline.notice or next(iter(told), None)
    if sent.verb == "run" and results[0].value is not None:
        learn(pipeline.pace, "run", [row.step_s for row in results[0].value.rows])
    return sent, results


def reason_to_leave(pipeline: Pipeline) -> Exit | Evidence | None:
    """Why no more is to be sent: the user asked, the run has had its chip-hours, or it must move to other hosts."""
    ready = pipeline.ready
    if time.monotonic() - pipeline.looked_at > LOOK_EVERY_S:
        pipeline.looked_at = time.monotonic()
        pipeline.leave = Exit.STOPPED if stop_spending(ready.report) else fleets.reason_to_leave(ready.fleet)
    return Exit.STOPPED if ready.interrupt.asked() else pipeline.notice or pipeline.leave


def stop_spending(report: Report) -> bool:
    """Whether the run has had its chip-hours; says so."""
    if not report.is_spent():
        return False
    limit = report.config.cluster.max_chip_hours
    said = f"cluster.max_chip_hours={limit:g}: used up, {report.chip_hours():.2f}; a resumed run needs a larger one"
    report.event("spent", reason=said)
    report.screen.say(said)
    return True
