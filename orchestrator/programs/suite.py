"""A suite's requests, on hosts that stand ready: first all scores, then all texts that are to be written.

What is answered is a line in the run directory, and never asked for again: a killed host costs what was in flight.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gemma.batching import rows, schedule
from gemma.batching.schedule import Batch
from gemma.messages import Scores
from gemma.text import stream as streams
from gemma.text.stream import TextStream
from orchestrator import config as configs
from orchestrator.chaos import chaos, faults
from orchestrator.config import Config
from orchestrator.evaluation import answers as ledger
from orchestrator.evaluation import results
from orchestrator.evaluation import suite as suites
from orchestrator.evaluation.suite import Suite
from orchestrator.exit import Exit
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts import group as hosts
from orchestrator.hosts.ready import ReadyHosts, Work
from orchestrator.programs import pipeline as pipelines
from orchestrator.programs.pipeline import Pipeline
from orchestrator.record.report import Report
from orchestrator.recovery import recover
from orchestrator.recovery.outcome import Evidence

CALL_S = 1.0  # of computing in a call: two are in flight
PLANS_UNDER_WAY = 2
STEPS = 16  # of decoding in a plan


@contextmanager
def asking(config: Config, folder: Path, report: Report) -> Iterator[tuple[Work, None]]:
    """What is asked is known before slices are; what was answered is judged once they are given back."""
    report.phase("data", "rendering the requests")
    suite = suites.open_suite(config, folder, report.screen.say)
    report.event("asked", **suites.facts(suite))
    yield partial(answer, suite), None
    if suites.left(suite) == 0:
        report.phase("other", "judging the answers")
        step = (config.evaluate.step if config.evaluate else None) or 0  # the axis that the run's own curves have
        report.wandb.log({"step": step} | results.for_wandb(suites.judge(suite)))


def answer(suite: Suite, ready: ReadyHosts) -> Exit | Evidence:
    """Until all is answered. Raises HostsFailedError."""
    planned = faults.plan(ready.config.chaos, max(1, suites.left(suite)), len(ready.group.workers))

    def look() -> None:
        chaos.strike(planned, "step", ready.group, ready.fleet, ready.report)
        fleets.start_spares(ready.fleet)

    left = score(suite, ready, look) if suites.missing_blocks(suite) else None
    if left is None and suites.missing_texts(suite):
        left = write(suite, opened_again(ready), look)
    return left or Exit.FINISHED


def opened_again(ready: ReadyHosts) -> ReadyHosts:
    """The same hosts with the program that writes."""
    config = configs.writing(ready.config)
    ready.report.phase("start", "compiling")
    opened = hosts.collect(hosts.open_programs(ready.group, config, ready.folder), ready.interrupt.asked)
    return replace(ready, config=config, opened=opened)


def score(suite: Suite, ready: ReadyHosts, look: suites.Look) -> Exit | Evidence | None:
    """Keeps two calls in flight. None once all scores are there."""
    done = suites.done(suite)
    recover.stand_at(ready, [(done, suite.asked.plan.digest())] * len(ready.group.workers), None)
    mesh, pipeline = ready.config.filled_mesh, Pipeline(ready, done)
    waiting = deque(rows.steps(suite.asked.plan, suites.missing_blocks(suite), mesh.replica * mesh.fsdp))
    step_s, left = 0.0, None
    sizes: deque[int] = deque()
    since = time.monotonic()
    while True:
        left = pipelines.reason_to_leave(pipeline)
        if waiting and not left and len(pipeline.sent) < pipelines.WINDOWS_IN_FLIGHT:
            count = max(1, min(len(waiting), round(CALL_S / step_s))) if step_s else 1
            sent = tuple(waiting.popleft() for _ in range(count))
            timeout = ready.config.timeout
            wait_s = timeout.step_s if not step_s else max(timeout.hang_s, 10 * step_s) + 3 * step_s * count
            pipelines.send(pipeline, "score", wait_s, sent)
            sizes.append(count)
            continue
        if not pipeline.sent:
            break
        _, results = pipelines.receive(pipeline)
        found: tuple[Scores, ...] = results[0].value
        for one in found:
            ledger.take_scores(suite.answers, one)
        now, count = time.monotonic(), sizes.popleft()
        step_s = max(step_s, (now - since) / count) if step_s else (now - since) / count
        ready.report.answered(suites.done(suite), (now - since) / count, blocks_left=len(suites.missing_blocks(suite)))
        since = now
        look()
    return left if suites.missing_blocks(suite) else None


def write(suite: Suite, ready: ReadyHosts, look: suites.Look) -> Exit | Evidence | None:
    """Each host writes texts of its own, two plans under way. None once all texts are there."""
    assert ready.config.serve is not None
    hosts_count = len(ready.group.workers)
    facts = recover.stand_at(ready, [(ready.config.serve.step,)] * hosts_count, None)
    shares = [Share(schedule.open_batch(facts.limits[0])) for _ in range(hosts_count)]
    for turn, number in enumerate(suites.missing_texts(suite)):
        begin(suite, shares[turn % hosts_count], number)
    pipeline = Pipeline(ready, suites.done(suite))
    sent, unasked, seconds, left = 0, False, 0.0, None
    timeout = ready.config.timeout
    while True:
        left = left or pipelines.reason_to_leave(pipeline)
        wait_s = max(timeout.hang_s, 10 * seconds) if seconds else timeout.step_s
        if not left and sent < PLANS_UNDER_WAY:
            plans = [schedule.plan(one.batch, STEPS, one.batch.limits.chunks[-1]) for one in shares]
            if not all(plan.empty for plan in plans):
                pipelines.send_each(pipeline, "step", wait_s, [(plan,) for plan in plans])
                sent, unasked = sent + 1, True
                continue
        if unasked and sent < PLANS_UNDER_WAY:
            pipelines.send(pipeline, "last", wait_s)
            unasked = False
        if not pipeline.sent:
            break
        _, results = pipelines.receive(pipeline)
        if results[0].value is None:
            continue
        sent -= 1
        for share, (answered,) in zip(shares, (result.value for result in results), strict=True):
            take(suite, share, schedule.take_answer(share.batch, answered))
            seconds = max(seconds, answered.seconds)
        ready.report.answered(suites.done(suite), seconds, texts_left=len(suites.missing_texts(suite)))
        look()
    return left if suites.missing_texts(suite) else None


@dataclass
class Share:
    """The texts that a host writes."""

    batch: Batch
    under_way: dict[int, tuple[schedule.Sequence, TextStream, list[str]]] = field(default_factory=dict)  # by number


def begin(suite: Suite, share: Share, number: int) -> None:
    text = suite.asked.texts[number]
    sequence = schedule.Sequence(number, text.tokens, text.sampling, text.max_tokens, text.ends)
    schedule.submit(share.batch, sequence)
    share.under_way[number] = sequence, TextStream(suite.coder, text.stops), []


def take(suite: Suite, share: Share, news: list[schedule.News]) -> None:
    """A text ends at its stop string, or where its sequence does."""
    for item in news:
        number = item.sequence.id
        if number not in share.under_way:
            continue
        sequence, stream, parts = share.under_way[number]
        parts.append(streams.add(stream, item.chosen.tokens if item.chosen else ()))
        if stream.stopped is None and sequence.ended is None:
            continue
        if stream.stopped is None:
            parts.append(streams.end(stream))
        else:
            schedule.cancel(share.batch, sequence)
        del share.under_way[number]
        ledger.take_text(suite.answers, number, "".join(parts), len(sequence.tokens))
