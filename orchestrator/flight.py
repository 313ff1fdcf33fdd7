"""What is on its way through the hosts: windows of steps, and what stands at their ends; taken in the order sent."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from gemma.reports import Bad, Opened, Ran
from orchestrator import group as hosts
from orchestrator import memory, rundir
from orchestrator.config import Config
from orchestrator.group import Call, Group
from orchestrator.memory import Attaching
from orchestrator.outcome import Evidence
from orchestrator.report import Report
from orchestrator.window import deadline_s, due, snapshot_every, window_end


@dataclass(frozen=True)
class Sent:
    """A verb in flight."""

    verb: str
    step: int  # that the hosts stand at once it is done
    call: Call


@dataclass
class Flight:
    """Of one attempt."""

    config: Config
    group: Group
    report: Report
    step: int  # sent so far
    saved: int  # newest step on disk or on its way there
    saved_at: float = field(default_factory=time.monotonic)
    sent: deque[Sent] = field(default_factory=deque)
    uncommitted: set[int] = field(default_factory=set)  # saved, not yet seen whole on disk
    saving: bool = False  # a save was just sent
    halted: bool = False  # the hosts must be brought back to an earlier step
    bad: Bad | None = None  # the first of the bad steps that halted them
    notice: Evidence | None = None  # a host is about to be taken away
    step_s: float | None = None  # a step's usual seconds
    longest_s: float | None = None
    pack_s: float = 0.0  # that the devices take for a snapshot
    wait_s: float = 0.0  # that hosts wait for one to be written
    snapshots: bool = False  # the hosts are attached to memory that outlives their processes


def windows(flight: Flight) -> int:
    return sum(sent.verb == "run" for sent in flight.sent)


def send(flight: Flight, verb: str, timeout_s: float, *args: Any) -> None:
    flight.sent.append(Sent(verb, flight.step, hosts.call(flight.group, timeout_s, verb, *args)))


def send_window(flight: Flight) -> None:
    """The next steps, and what is due after them."""
    config, first = flight.config, flight.step
    stops = (config.checkpoint.every, config.eval.every)
    flight.step = window_end(first, config.train.steps, flight.step_s, stops)
    timeout = config.timeout
    wait_s = deadline_s(timeout.step_s, timeout.hang_s, flight.longest_s, flight.step - first)
    send(flight, "run", wait_s, first, flight.step, flight.report.newest, every(flight))
    send_due(flight)


def send_due(flight: Flight) -> None:
    """An evaluation or a save that stands at this step, or that an earlier attempt did not come to."""
    config, step, timeout = flight.config, flight.step, flight.config.timeout
    if step == 0:
        return
    if config.eval.every and due(step, config.train.steps, config.eval.every) and step > flight.report.evaluated_step:
        send(flight, "evaluate", timeout.compile_s + timeout.step_s, step)
    minutes = (time.monotonic() - flight.saved_at) / 60
    late = 0 < config.checkpoint.every <= step - flight.saved or 0 < config.checkpoint.every_minutes <= minutes
    if step > flight.saved and (late or due(step, config.train.steps, config.checkpoint.every)):
        send_save(flight)


def send_save(flight: Flight) -> None:
    send(flight, "save", flight.config.timeout.save_s, flight.step)
    flight.saving = True
    flight.saved, flight.saved_at = flight.step, time.monotonic()


def send_keep(flight: Flight, attaching: Attaching, opened: Sequence[Opened]) -> None:
    """From here on the hosts take snapshots; not if a keeper has died since, which the next attempt replaces."""
    timeout, group = flight.config.timeout, flight.group
    if flight.config.checkpoint.snapshot == "off":
        return
    slices = [spot.slice_name for spot in group.placement.spots]
    try:
        arguments = memory.keep_arguments(attaching, [one.share_key for one in opened], slices, flight.report.attempt)
    except RayError as error:
        flight.report.screen.say(f"no snapshots until the next restart: {str(error).splitlines()[0]}")
        return
    call = hosts.call_each(group, timeout.compile_s + timeout.step_s, "keep", arguments)
    flight.sent.append(Sent("keep", flight.step, call))
    flight.snapshots = True


def every(flight: Flight) -> int:
    """Steps from snapshot to snapshot; 0 is none."""
    wanted = flight.config.checkpoint.snapshot
    if not flight.snapshots or wanted == "off":
        return 0
    if isinstance(wanted, int):
        return wanted
    return snapshot_every(flight.pack_s, flight.wait_s, flight.step_s or 1.0, flight.config.checkpoint.snapshot_cost)


def take(flight: Flight) -> None:
    """Waits for the oldest verb in flight and writes down what came. Raises HostsFailedError."""
    sent, report = flight.sent.popleft(), flight.report
    answers = hosts.collect(sent.call)
    if flight.halted:
        return  # sent before that was known: of no worth
    told = [Evidence(rank, notice=a.notice, time=time.time()) for rank, a in enumerate(answers) if a.notice]
    flight.notice = flight.notice or next(iter(told), None)
    result = answers[0].value
    if sent.verb == "run":
        take_window(flight, result)
    elif sent.verb == "evaluate":
        report.evaluated(result)
    elif sent.verb == "keep":
        flight.pack_s = result
        report.event("keep", sent.step, every=every(flight), pack_s=round(result, 6))
    else:
        report.saved(sent.step, result)
        flight.uncommitted.add(sent.step)
    announce(flight)


def take_window(flight: Flight, ran: Ran) -> None:
    flight.report.rows(ran.rows)
    for bad in ran.bad:
        flight.report.bad(bad)
        flight.bad = bad if flight.bad is None else flight.bad
    flight.halted = ran.halted
    if not ran.halted:
        flight.bad = None
    if not ran.rows:
        return
    times = sorted(row.step_s for row in ran.rows)
    flight.step_s = times[len(times) // 2]
    flight.longest_s = max(times[-1], flight.longest_s or 0.0)
    if ran.snapshots:
        flight.wait_s = ran.wait_s / ran.snapshots


def announce(flight: Flight) -> None:
    """Only a commit is announced: a save that is whole on disk."""
    if not flight.uncommitted:
        return
    for step in sorted(flight.uncommitted.intersection(rundir.committed(flight.report.folder))):
        flight.report.event("commit", step)
        flight.uncommitted.discard(step)
