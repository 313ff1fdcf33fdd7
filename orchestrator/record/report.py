"""Everything a run writes down: metrics, events, goodput, wandb, the screen. One writer, the controller."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma.messages import BadStep, Evaluated, Restored, Row
from gemma.plan import v5p
from gemma.text.order import Order, rows_before
from orchestrator.config import Config
from orchestrator.record import rundir
from orchestrator.record.goodput import Ledger
from orchestrator.record.progress import Screen
from orchestrator.record.source import is_submitted
from orchestrator.record.wandb_log import WandbLog, eval_row
from orchestrator.recovery.incident import Incident, as_rows, page
from orchestrator.recovery.outcome import Evidence
from orchestrator.recovery.policy import GiveUp, Restart

GOODPUT_EVERY_S = 5.0


def resume_command(config: Config, folder: Path, more: str = "") -> str:
    if is_submitted():
        return f"python -m launch.resume run={folder.name} detach=true{more}"
    root = "" if config.run.root == "runs" else " " + shlex.quote(f"run.root={config.run.root}")
    return f"python -m launch.resume run={folder.name}{root}{more}"


def seen(cause: Evidence) -> str:
    """What was seen of a failure, in a line."""
    if cause.unfit or cause.notice:
        return cause.unfit or str(cause.notice)
    if cause.died:
        how = cause.crash or ("killed for memory" if cause.out_of_memory else "killed from outside: no crash report")
        return f"its process is gone, {how}" if cause.node_alive else "its node is gone"
    if cause.overdue:
        return f"not done in time: {cause.overdue}{', its process is stopped' if cause.stopped else ''}"
    return f"{cause.exception}: {cause.message}"


class Report:
    """Open for the life of a controller."""

    def __init__(self, config: Config, folder: Path, commanded: float, screen: Screen | None = None):
        """commanded: the time.monotonic() at which the user asked."""
        self.config, self.folder, self.commanded = config, folder, commanded
        self.ledger = Ledger()
        if earlier := rundir.goodput(folder):
            self.ledger.carry(earlier)
        self.metrics_file = rundir.Appender(folder / "metrics.jsonl")
        self.events_file = rundir.Appender(folder / "events.jsonl")
        self.screen = screen or Screen()
        self.wandb = WandbLog(config, folder, self.screen.say)
        self.newest = max(rundir.metrics(folder), default=0)  # the newest step ever reported
        self.step = 0  # the newest of this attempt
        told = rundir.events(folder)
        self.attempt = max((e.get("attempt", 0) for e in told), default=0)
        self.evaluated_step = max((e["step"] for e in told if e["event"] == "eval"), default=0)
        self.facts: Restored | None = None
        self.goodput_written = 0.0
        self.unwritten: str | None = None  # the user knows why
        self.goodput_problem: str | None = None
        self.began = 0.0  # time.time() of this attempt
        self.newest_row: dict[str, Any] = {}
        self.struck_at: set[tuple[int, str]] = set()
        self.struck = {e["index"] for e in told if e["event"] == "chaos"}  # faults on purpose, done already
        self.order = Order(((0, config.train.batch),))  # which rows the steps train on
        self.bad_steps = [e["step"] for e in told if e["event"] == "bad_step"]
        self.last_row_time = 0.0  # time.time() at which the newest step was done
        self.story = ""  # of the newest failure, in full
        self.first_step_s: float | None = None  # from the command to the first step's loss
        self.restoring: int | None = None  # the checkpoint that is being read
        self.incidents: list[Incident] = [Incident(**row) for row in self.ledger.incidents]
        self.detected_at = self.ready_at = 0.0  # time.monotonic() of the newest incident

    def begin_attempt(self) -> None:
        self.attempt += 1
        self.step, self.began = 0, time.time()

    def phase(self, bucket: str, shown: str) -> float:
        """The controller turns to something else; returns the seconds the last thing took."""
        self.screen.phase(shown, self.newest)
        if bucket != self.ledger.current:
            self.event("phase", name=bucket)
        return self.ledger.switch(bucket)

    def event(self, what: str, step: int | None = None, duration_s: float | None = None, **evidence: Any) -> None:
        row: dict[str, Any] = {"time": time.time(), "event": what, "attempt": self.attempt}
        row |= {"step": self.step if step is None else step}
        if duration_s is not None:
            row["duration_s"] = round(duration_s, 4)
        self.events_file.write(row | evidence)
        self.look_at_files()

    def provided(self, what: str, news: str) -> None:
        """What the provider of the slices did, or said."""
        self.event("provider", of=what, news=news)
        self.screen.say(f"{what}: {news}")

    def look_at_files(self) -> None:
        """Tells the user once that the disk takes nothing, and once that it does again."""
        problem = self.metrics_file.problem or self.events_file.problem or self.goodput_problem
        if problem and not self.unwritten:
            self.screen.say(
                f"WARNING: {self.folder} cannot be written: {problem}; training goes on, lines of metrics and events"
                f" are kept in memory, up to {rundir.KEPT_LINES:,}, and tried again"
            )
        elif self.unwritten and not problem:
            self.screen.say(f"{self.folder} is written again")
        self.unwritten = problem

    def failed(self, outcome: str, cause: Evidence, done: int, story: Path | None) -> None:
        """done: steps done by the hosts, told or not."""
        now = time.time()
        detect_s = max(0.0, now - (cause.time or max(self.last_row_time, self.began)))
        said = seen(cause)
        self.ledger.move("step", "detect", detect_s)
        self.detected_at = time.monotonic()
        said = " ".join(said.split())[:500]
        rank, attempt = cause.rank, self.attempt
        self.event(
            "failure",
            done,
            outcome=outcome,
            rank=rank,
            evidence=said,
            detect_s=round(detect_s, 4),
            story=str(story or ""),
        )
        self.incidents.append(Incident(now - detect_s, attempt, outcome, rank, done, said, detect_s=detect_s))
        where = f" ({story})" if story else ""
        self.screen.say(f"{outcome}: rank {cause.rank} at step {done}: {said[:200]}{where}")
        if outcome == "error" and cause.traceback:
            self.screen.say(cause.traceback.rstrip())
        self.story = story.read_text(errors="replace") if story and story.exists() else ""

    def decided(self, decision: Restart | GiveUp) -> None:
        name = type(decision).__name__
        self.event("decision", decision=name, reason=decision.reason)
        self.incidents[-1] = replace(self.incidents[-1], decision=f"{name}: {decision.reason}")
        if isinstance(decision, Restart):
            self.ledger.restarts += 1
            self.screen.say(f"restarting: {decision.reason}")
            return
        path = self.folder / "incident.txt"
        command = resume_command(self.config, self.folder)
        rundir.try_text(path, page(self.folder.name, decision.reason, self.incidents, self.story, self.folder, command))
        self.screen.say(f"gave up: {decision.reason} ({path})")

    def restarted(self, step: int, source: str) -> None:
        """The hosts stand ready again after the newest incident."""
        last = self.incidents[-1]
        self.ready_at = time.monotonic()
        lost, took_s = max(0, last.step - step), self.ready_at - self.detected_at
        self.incidents[-1] = replace(last, source=source, steps_lost=lost, restart_s=took_s)

    def ready(self, facts: Restored, snapshot_of: int | None, duration_s: float) -> None:
        """The hosts stand ready: splits the time since they started into what they did.

        snapshot_of: the attempt whose snapshot they restored, if any. Its last results may not have been told yet.
        """
        self.facts, self.step, self.restoring = facts, facts.step, None
        self.screen.expect(facts.steps)
        for bucket, seconds in facts.seconds.items():
            self.ledger.move("start", bucket, seconds)
        self.event("compile", facts.step, facts.seconds.get("compile"), cached=facts.compile_cached)
        name = "initialise" if facts.fresh else "restore"
        evidence = {"seconds": facts.seconds, "platform": facts.platform, "fingerprint": facts.fingerprint}
        source = "start" if facts.fresh else "disk" if snapshot_of is None else "memory"
        evidence["source"] = source
        if self.incidents and self.incidents[-1].restart_s is None:
            self.restarted(facts.step, source)
        self.event(name, facts.step, facts.seconds.get("restore"), **evidence, batches=self.order.batches)
        for said in facts.warnings if self.first_step_s is None else ():
            self.screen.say(f"WARNING: {said}")
        if self.config.cluster.kind != "local" and facts.platform != "tpu":
            self.screen.say(f"the hosts have no TPU: they compute on {facts.platform}")
        self.wandb.log({"step": facts.step, "attempt": self.attempt, "restarts": self.ledger.restarts})
        for row in facts.rows:
            if row.step > self.newest:
                self.write_row(row, snapshot_of)
        for found in facts.evals:
            if found.step > self.evaluated_step:
                self.evaluated(found)

    def rows(self, rows: Sequence[Row]) -> None:
        if self.first_step_s is None and rows:
            self.first_step_s = time.monotonic() - self.commanded
            self.event("first_step", rows[0].step, self.first_step_s)
        for row in rows:
            if row.step <= self.newest:
                self.ledger.move("step", "replay", row.step_s)
            self.write_row(row, self.attempt)
        self.write_goodput()

    def served(self, **measured: float) -> None:
        """What a server does at a moment: a line of metrics.jsonl."""
        row = {"step": self.newest, "attempt": self.attempt, "time": time.time()} | measured
        self.step = self.newest
        self.metrics_file.write(row)
        self.wandb.log(row)
        self.look_at_files()
        self.write_goodput()

    def answered(self, done: int, step_s: float, **measured: float) -> None:
        """Of an evaluation: how many blocks of scores and texts are answered."""
        self.step = self.newest = done
        self.served(step_s=step_s, **measured)

    def bad(self, bad: BadStep) -> None:
        """A step whose update was not applied."""
        row = self.newest_row
        facts = {"loss": row["loss"], "grad_norm": row["grad_norm"]} if row.get("step") == bad.step else {}
        self.bad_steps.append(bad.step)
        self.event("bad_step", bad.step, places=bad.places, ids=list(bad.ids), **facts)
        self.screen.say(f"step {bad.step}: its update is not finite, or spikes; not applied (its rows: events.jsonl)")

    def write_row(self, row: Row, attempt: int | None) -> None:
        last = self.incidents[-1] if self.incidents else None
        if last and last.catch_up_s is None and last.restart_s is not None and row.step > last.step:
            self.incidents[-1] = replace(last, catch_up_s=max(0.0, time.monotonic() - self.ready_at))
        self.step, self.newest, self.last_row_time = row.step, max(self.newest, row.step), row.time
        full = self.full_row(row) | {"attempt": attempt}
        self.newest_row = full
        self.metrics_file.write(full)
        self.look_at_files()
        self.wandb.log(full)
        self.screen.step(full)

    def full_row(self, row: Row) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        assert self.facts is not None
        config, metrics = self.config, row.metrics
        per_step = config.train.batch * config.data.sequence
        peak = v5p.FLOPS * config.chips  # of a simulated slice too
        step_s = max(row.step_s, 1e-9)
        return {
            "step": row.step,
            "attempt": self.attempt,
            **metrics,
            "bits_per_byte": self.bits_per_byte(metrics["loss"]),
            "tokens": rows_before(self.order, row.step) * config.data.sequence,
            "step_s": row.step_s,
            "time": row.time,
            "tokens_per_s": per_step / step_s,
            "mfu": self.facts.step_flops / step_s / peak,
        }

    def bits_per_byte(self, loss: float) -> float:
        """Nats a target to bits a byte of text: comparable over tokenizers."""
        assert self.facts is not None
        return loss / 0.6931471805599453 / self.facts.bytes_per_target

    def evaluated(self, found: Evaluated) -> None:
        self.ledger.move("step", "eval", found.seconds)
        loss = found.sets[0][1]  # of the run's own split
        bits, by_set = self.bits_per_byte(loss), {name: loss for name, loss, _ in found.sets}
        self.event("eval", found.step, found.seconds, loss=loss, bits_per_byte=bits, sets=by_set)
        self.wandb.log(eval_row(found.step, loss, bits, by_set))
        self.evaluated_step = found.step

    def asked(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """What the rows of eval.tasks came to, in percent."""
        self.ledger.move("step", "tasks", seconds)
        self.event("tasks", step, seconds, values=dict(values))
        self.wandb.log({"eval/step": step} | {f"eval/tasks/{name}": value for name, value in values.items()})
        told = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        self.screen.say(f"step {step}: {told}")

    def saved(self, step: int, duration_s: float) -> None:
        self.ledger.move("step", "save", duration_s)
        self.event("save", step, duration_s)

    def chip_hours(self) -> float:
        """Of the run so far, as if all its slices had been there from start to end."""
        return self.ledger.held_s() / 3600 * self.config.chips * self.config.replicas

    def is_spent(self) -> bool:
        """Whether the run has had the chip-hours it may have."""
        limit = self.config.cluster.max_chip_hours
        return limit is not None and self.chip_hours() >= limit

    def totals(self) -> dict[str, Any]:
        """What goodput.json holds."""
        spent: dict[str, float] = {"chip_hours": round(self.chip_hours(), 4)}
        if price := self.config.cluster.price_per_chip_hour:
            spent["cost"] = round(self.chip_hours() * price, 2)
        return self.ledger.snapshot() | spent | {"incidents": as_rows(self.incidents)}

    def write_goodput(self, now: bool = False) -> dict[str, Any]:
        found = self.totals()
        if now or time.monotonic() - self.goodput_written > GOODPUT_EVERY_S:
            self.write_ledger(found)
            self.goodput_written = time.monotonic()
            self.wandb.log({"step": self.newest, "goodput": found["goodput"], "restarts": found["restarts"]})
        return found

    def close(self) -> dict[str, Any]:
        """Writes what is left; returns the goodput."""
        self.screen.close()
        self.write_goodput(now=True)
        self.wandb.finish()
        found = self.totals()
        self.write_ledger(found)
        for file in (self.metrics_file, self.events_file):
            file.flush()
            if lost := len(file.waiting) + file.lost:
                self.screen.say(f"WARNING: {lost} lines of {file.path} could not be written ({file.problem})")
        return found

    def write_ledger(self, found: dict[str, Any]) -> None:
        try:
            rundir.write_json(self.folder / "goodput.json", found)
            self.goodput_problem = None
        except OSError as error:
            self.goodput_problem = f"goodput.json: {error.strerror}"
        self.look_at_files()
