"""Held-out loss of weights, on hosts that stand ready: a batch is a step, and its line in metrics.jsonl its answer.

A killed host costs the batches in flight. What is answered is never computed again, also by a later controller, and
the sums are added in the order of the batches: the result is the same to the bit, whatever happened on the way.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma.config import OWN_SPLIT
from orchestrator.chaos import chaos, faults
from orchestrator.exit import Exit
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts.ready import ReadyHosts
from orchestrator.programs import pipeline as pipelines
from orchestrator.programs.pipeline import Pipeline
from orchestrator.record import rundir
from orchestrator.record.jsonfile import read_object
from orchestrator.recovery import recover
from orchestrator.recovery.outcome import Evidence

RESULT = "evaluation.json"


def evaluate(ready: ReadyHosts) -> Exit | Evidence:
    """Keeps two windows of batches in flight until all are answered, and writes the result. Raises HostsFailedError."""
    report, group = ready.report, ready.group
    done = answered(rundir.metrics(ready.folder))
    facts = recover.stand_at(ready, [(done,)] * len(group.workers), None)
    planned = faults.plan(ready.config.chaos, facts.steps, len(group.workers))
    pipeline = Pipeline(ready, done)
    left: Exit | Evidence | None = None
    while True:
        left = pipelines.reason_to_leave(pipeline)
        if pipeline.step < facts.steps and not left and pipelines.has_room(pipeline):
            pipelines.send_window(pipeline, facts.steps, ())
            continue
        if not pipeline.sent:
            break
        _, results = pipelines.receive(pipeline)
        report.rows(results[0].value.rows)
        chaos.strike(planned, "step", group, ready.fleet, report)
        fleets.start_spares(ready.fleet)
    if pipeline.step < facts.steps:
        return left or Exit.STOPPED
    found = by_set(rundir.metrics(ready.folder), facts.sets)
    own = found[OWN_SPLIT]["loss"]
    result: dict[str, Any] = {"loss": own, "bits_per_byte": report.bits_per_byte(own), "sets": found}
    rundir.write_json(ready.folder / RESULT, result)
    report.event("evaluated", facts.steps, **result)
    return Exit.FINISHED


def answered(rows: Mapping[int, Mapping[str, Any]]) -> int:
    """How many batches are answered without a gap. Pure. rows: of metrics.jsonl, by step."""
    done = 0
    while done + 1 in rows:
        done += 1
    return done


def by_set(rows: Mapping[int, Mapping[str, Any]], batches: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """The mean loss in nats over all targets of each set. Pure.

    rows: of metrics.jsonl, by step. batches: how many steps each set has, in the order they were answered.
    """
    found, first = {}, 1
    for name, count in batches.items():
        steps = range(first, first + count)
        loss_sum, targets = (sum(rows[step][key] for step in steps) for key in ("loss_sum", "targets"))
        found[name] = {"loss": loss_sum / max(targets, 1.0), "targets": targets}
        first += count
    return found


def evaluated(folder: Path) -> dict[str, Any] | None:
    """What a finished evaluation found."""
    return read_object(folder / RESULT)
