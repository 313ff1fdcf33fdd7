"""Held-out loss of weights, on hosts that stand ready: a batch is a step, and its line in metrics.jsonl its answer.

A killed host costs the batches in flight. What is answered is never computed again, also by a later controller, and
the sums are added in the order of the batches: the result is the same to the bit, whatever happened on the way.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.chaos import chaos, faults
from orchestrator.exit import Exit
from orchestrator.hosts import fleet as fleets
from orchestrator.hosts.ready import ReadyHosts
from orchestrator.programs import pipeline as pipelines
from orchestrator.programs.pipeline import Pipeline
from orchestrator.record import rundir
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
    found = totals(rundir.metrics(ready.folder), facts.steps, facts.bytes_per_target)
    rundir.write_json(ready.folder / RESULT, found)
    report.event("evaluated", facts.steps, **found)
    return Exit.FINISHED


def answered(rows: Mapping[int, Mapping[str, Any]]) -> int:
    """How many batches are answered without a gap. Pure. rows: of metrics.jsonl, by step."""
    done = 0
    while done + 1 in rows:
        done += 1
    return done


def totals(rows: Mapping[int, Mapping[str, Any]], batches: int, bytes_per_target: float) -> dict[str, float]:
    """The mean over all targets, in nats and in bits a byte of text. Pure. rows: of metrics.jsonl, by step."""
    loss_sum = sum(rows[step]["loss_sum"] for step in range(1, batches + 1))
    targets = sum(rows[step]["targets"] for step in range(1, batches + 1))
    loss = loss_sum / max(targets, 1.0)
    bits = loss / 0.6931471805599453 / bytes_per_target
    return {"loss": loss, "bits_per_byte": bits, "targets": targets, "batches": batches}


def evaluated(folder: Path) -> dict[str, Any] | None:
    """What a finished evaluation found."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / RESULT).read_text())
        return found if isinstance(found, dict) else None
    return None
