"""Everything a run writes down: metrics, events, goodput, wandb, the screen. One writer, the controller."""

import json
import time
from pathlib import Path
from typing import Any

from gemma import v5p
from gemma.reports import Restored, Row
from orchestrator import rundir
from orchestrator.config import Config
from orchestrator.goodput import Ledger
from orchestrator.progress import Screen
from orchestrator.wandb_log import WandbLog, eval_row

GOODPUT_EVERY_S = 5.0


class Report:
    """Open for the life of a controller."""

    def __init__(self, config: Config, folder: Path, commanded: float):
        """commanded: the time.monotonic() at which the user asked."""
        self.config, self.folder, self.commanded = config, folder, commanded
        self.ledger = Ledger()
        earlier = folder / "goodput.json"
        if earlier.exists():
            self.ledger.carry(json.loads(earlier.read_text()))
        self.metrics_file = rundir.Appender(folder / "metrics.jsonl")
        self.events_file = rundir.Appender(folder / "events.jsonl")
        self.screen = Screen(config.train.steps)
        self.wandb = WandbLog(config, folder, self.screen.say)
        self.newest = max(rundir.metrics(folder), default=0)  # the newest step ever reported
        self.step = 0  # the newest of this attempt
        self.attempt = max((e.get("attempt", 0) for e in rundir.events(folder)), default=0)
        self.facts: Restored | None = None
        self.goodput_written = 0.0
        self.first_step_s: float | None = None  # from the command to the first step's loss

    def begin_attempt(self) -> None:
        self.attempt += 1
        self.step = 0

    def phase(self, bucket: str, shown: str) -> float:
        """The controller turns to something else; returns the seconds the last thing took."""
        self.screen.phase(shown, self.newest)
        return self.ledger.switch(bucket)

    def event(self, name: str, step: int | None = None, duration_s: float | None = None, **evidence: Any) -> None:
        row: dict[str, Any] = {"time": time.time(), "event": name, "attempt": self.attempt}
        row |= {"step": self.step if step is None else step}
        if duration_s is not None:
            row["duration_s"] = round(duration_s, 4)
        self.events_file.write(row | evidence)

    def ready(self, facts: Restored, duration_s: float) -> None:
        """The hosts stand ready: splits the time since they started into what they did."""
        self.facts, self.step = facts, facts.step
        for bucket, seconds in facts.seconds.items():
            self.ledger.move("start", bucket, seconds)
        self.event("compile", facts.step, facts.seconds.get("compile"), cached=facts.compile_cached)
        name = "initialise" if facts.fresh else "restore"
        evidence = {"seconds": facts.seconds, "platform": facts.platform, "fingerprint": facts.fingerprint}
        self.event(name, facts.step, facts.seconds.get("restore"), **evidence)
        if self.config.cluster.kind != "local" and facts.platform != "tpu":
            self.screen.say(f"the hosts have no TPU: they compute on {facts.platform}")
        self.wandb.log({"step": facts.step, "attempt": self.attempt, "restarts": self.ledger.restarts})

    def rows(self, rows: list[Row]) -> None:
        assert self.facts is not None
        if self.first_step_s is None and rows:
            self.first_step_s = time.monotonic() - self.commanded
            self.event("first_step", rows[0].step, self.first_step_s)
        for row in rows:
            if row.step <= self.newest:
                self.ledger.move("step", "replay", row.step_s)
            self.step, self.newest = row.step, max(self.newest, row.step)
            full = self.full_row(row)
            self.metrics_file.write(full)
            self.wandb.log(full)
            self.screen.step(full)
        self.write_goodput()

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
            "loss": metrics["loss"],
            "bits_per_byte": self.bits_per_byte(metrics["loss"]),
            "grad_norm": metrics["grad_norm"],
            "param_norm": metrics["param_norm"],
            "learning_rate": metrics["learning_rate"],
            "tokens": row.step * per_step,
            "targets": metrics["targets"],
            "ok": metrics["ok"],
            "step_s": row.step_s,
            "tokens_per_s": per_step / step_s,
            "mfu": self.facts.step_flops / step_s / peak,
        }

    def bits_per_byte(self, loss: float) -> float:
        """Nats a target to bits a byte of text: comparable over tokenizers."""
        assert self.facts is not None
        return loss / 0.6931471805599453 / self.facts.bytes_per_target

    def evaluated(self, step: int, loss: float, duration_s: float) -> None:
        self.ledger.move("step", "eval", duration_s)
        bits = self.bits_per_byte(loss)
        self.event("eval", step, duration_s, loss=loss, bits_per_byte=bits)
        self.wandb.log(eval_row(step, loss, bits))

    def saved(self, step: int, duration_s: float) -> None:
        self.ledger.move("step", "save", duration_s)
        self.event("save", step, duration_s)

    def write_goodput(self, now: bool = False) -> dict[str, Any]:
        found = self.ledger.snapshot()
        if now or time.monotonic() - self.goodput_written > GOODPUT_EVERY_S:
            rundir.write_json(self.folder / "goodput.json", found)
            self.goodput_written = time.monotonic()
            self.wandb.log({"step": self.newest, "goodput": found["goodput"], "restarts": found["restarts"]})
        return found

    def close(self) -> dict[str, Any]:
        """Writes what is left; returns the goodput."""
        self.screen.close()
        self.write_goodput(now=True)
        self.wandb.finish()
        found = self.ledger.snapshot()
        rundir.write_json(self.folder / "goodput.json", found)
        return found
