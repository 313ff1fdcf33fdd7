"""What the user sees while a run goes on, and the summary after it."""

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # where there is no terminal to draw on


class Screen:
    """A bar on a terminal, a line now and then elsewhere. Standard error: standard output stays for results."""

    def __init__(self, within: "Screen | None" = None, name: str = "") -> None:
        """within, name: of a part of a run, whose words are shown under its name among the run's."""
        self.name = name
        self.console: Console = within.console if within else Console(stderr=True, highlight=False)
        self.steps: int | None = None  # of the whole run
        self.last_line = 0.0
        self.phase_shown = ""
        self.bar: Progress | None = None
        if self.console.is_terminal and within is None:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self.task = self.bar.add_task("starting", total=None, numbers="")
            self.bar.start()

    def expect(self, steps: int) -> None:
        """How many steps the whole run has."""
        self.steps = steps
        if self.bar:
            self.bar.update(self.task, total=steps)

    def phase(self, name: str, step: int = 0) -> None:
        """What is being waited for: nobody should have to tell a long compile from a hang."""
        if name == self.phase_shown:
            return
        self.phase_shown = name
        if self.bar:
            self.bar.update(self.task, description=name, completed=step)
        else:
            self.say(name)

    def step(self, row: dict[str, Any]) -> None:
        numbers = f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=row["step"], numbers=numbers)
            return
        now = time.monotonic()
        if now - self.last_line >= LINE_EVERY_S or row["step"] == self.steps:
            self.last_line = now
            left = ((self.steps or 0) - row["step"]) * row["step_s"]
            self.say(f"step {row['step']}/{self.steps}  {numbers}  {left:.0f} s left")

    def say(self, text: str) -> None:
        text = f"{self.name}: {text}" if self.name else text
        with contextlib.suppress(SystemExit, OSError):  # rich's way of saying that nobody reads any more: train on
            self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def shown(value: float | None, digits: int) -> str:
    """A value of metrics.jsonl, where null is a number that was not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"


def summary(
    folder: Path,
    how: str,
    results: list[str],
    goodput: dict[str, Any],
    first_step_s: float | None,
    resume: str,
    extending: str | None,
) -> str:
    """Where everything lies and where the time went. Times add up over all attempts; the first step is this one's."""
    buckets = {name: s for name, s in goodput["buckets"].items() if s >= 0.05}
    times = ", ".join(f"{name} {s:.1f} s" for name, s in sorted(buckets.items(), key=lambda item: -item[1]))
    lines = [
        f"run {folder.name}: {how}",
        *(f"  {line}" for line in results),
        f"  metrics      {folder / 'metrics.jsonl'}",
        f"  checkpoints  {folder / 'checkpoints'}",
        f"  wandb        {folder / 'wandb'}",
        f"  time         {goodput['wall_s']:.1f} s: {times}",
        "  first step   " + ("none" if first_step_s is None else f"{first_step_s:.1f} s after the command"),
        f"  resume       {resume}",
        *([f"               {extending}"] if extending else []),
    ]
    return "\n".join(lines)


def training_results(rows: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """rows: of metrics.jsonl, by step."""
    if not rows:
        return []
    first, last = rows[min(rows)], rows[max(rows)]
    return [
        f"step {last['step']}: loss {shown(first.get('loss'), 4)} -> {shown(last.get('loss'), 4)},"
        f" bits per byte {shown(first.get('bits_per_byte'), 3)} -> {shown(last.get('bits_per_byte'), 3)}"
    ]


def evaluation_results(found: Mapping[str, Any] | None, rows: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """found: evaluation.json, where the evaluation is done. rows: of metrics.jsonl, by step."""
    if found is None:
        return [f"{len(rows)} batches answered"] if rows else []
    per_byte = f"{found['bits_per_byte']:.4f} bits per byte"
    sets = [f"{name}: loss {one['loss']:.6f} over {one['targets']:,.0f} targets" for name, one in found["sets"].items()]
    return [f"held-out loss {found['loss']:.6f}, {per_byte}", *sets]
