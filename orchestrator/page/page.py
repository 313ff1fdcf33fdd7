"""A run on one HTML page that needs nothing else: its style and its script are in it, and no network is asked."""

import base64
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from orchestrator.page.curves import curves, final
from orchestrator.page.figures import clock, duration, figure, short
from orchestrator.page.history import History, number
from orchestrator.page.walltime import lived_s, walltime
from orchestrator.record.goodput import BUCKETS

FOLDER = Path(__file__).parent
UPLOT = FOLDER / "uplot-1.6.32"  # its licence goes into each page
MEANS = {
    "step": "steps never done before",
    "replay": "steps done again after a failure",
    "reserve": "waiting for slices",
    "start": "host processes coming up",
    "data": "opening the text",
    "compile": "compiling or loading the step",
    "restore": "reading a checkpoint or snapshot",
    "eval": "held-out loss",
    "tasks": "the model card's tasks",
    "save": "steps held up by a checkpoint",
    "snapshot": "steps held up by a copy in host memory",
    "detect": "from a failure to its detection",
    "down": "clearing up after a failure",
    "other": "none of these",
}
LOOKS = {"finished": "good", "running": "busy", "stopped": "rest"}
INCIDENTS_SHOWN = 500


def page(history: History) -> str:
    training, time = curves(history.rows, history.evals), walltime(history)
    style = f"{(UPLOT / 'uPlot.min.css').read_text()}\n{(FOLDER / 'report.css').read_text()}"
    licence = (UPLOT / "LICENSE").read_text()
    script = f"/*\n{licence}*/\n{(UPLOT / 'uPlot.iife.min.js').read_text()}\n{(FOLDER / 'report.js').read_text()}"
    return template().render(
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; script-src '{digest(script)}';"
        f" style-src '{digest(style)}'",
        style=style,
        script=script,
        data={"training": training, "time": time, "buckets": BUCKETS},
        history=history,
        look=LOOKS.get(history.state, "poor"),
        tiles=tiles(history),
        facts=facts(history),
        commands=commands(history),
        training=training,
        phases=ordered({phase[2] for phase in time.get("phases", [])}),
        incidents=history.incidents[:INCIDENTS_SHOWN],
        ledger=ledger(history),
    )


@cache
def template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # What is on the page as JSON is made of numbers and texts alone: a NaN would be no JSON.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"clock": clock, "duration": duration, "number": number, "bucket": bucket}
    return environment.get_template("report.html")


def printable(value: Any) -> Any:
    """HTML cannot carry control characters and lone surrogates: they are replaced."""
    if hasattr(value, "__html__"):
        return value
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def digest(content: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def bucket(name: str) -> str:
    """The one that gives it its colour."""
    return name if name in BUCKETS else "other"


def ordered(names: Sequence[str] | set[str]) -> list[str]:
    return [*(name for name in BUCKETS if name in names), *sorted(set(names) - set(BUCKETS))]


def tiles(history: History) -> list[tuple[str, str]]:
    """Figures and what they are."""
    if history.served or section(history, "serve"):
        return [*served(history), *of_every_run(history)]
    rows = final(history.rows)
    last = rows[-1] if rows else None
    steps = section(history, "train").get("steps")
    speeds = sorted(row.tokens_per_s for row in rows if math.isfinite(row.tokens_per_s))
    return [
        (f"{last.step if last else 0:,}", f"of {steps:,} steps" if isinstance(steps, int) else "steps"),
        (figure(last.loss if last else math.nan), "loss"),
        (figure(last.bits_per_byte if last else math.nan), "bits per byte"),
        (short(speeds[len(speeds) // 2]) if speeds else "–", "tokens/s, median"),
        *of_every_run(history),
    ]


def served(history: History) -> list[tuple[str, str]]:
    def median(name: str) -> float:
        found = sorted(value for one in history.served if math.isfinite(value := getattr(one, name)))
        return found[len(found) // 2] if found else math.nan

    tokens = max((one.tokens for one in history.served if math.isfinite(one.tokens)), default=0.0)
    return [
        (f"{tokens:,.0f}", "tokens"),
        (short(median("tokens_per_s")), "tokens/s, median"),
        (figure(median("first_token_s")), "s to the first token, median"),
        (figure(median("between_tokens_s")), "s between tokens, median"),
    ]


def of_every_run(history: History) -> list[tuple[str, str]]:
    goodput = number(history.goodput.get("goodput"))
    return [
        (f"{goodput:.1%}" if math.isfinite(goodput) else "–", "goodput"),
        (str(history.goodput.get("restarts", "–")), "restarts"),
        (duration(number(history.goodput.get("wall_s"))), "wall time"),
    ]


def section(history: History, name: str) -> dict[str, Any]:
    found = history.manifest.config.get(name)
    return found if isinstance(found, dict) else {}


def facts(history: History) -> dict[str, str]:
    found, cluster, data = history.manifest, section(history, "cluster"), section(history, "data")
    slices, batch = cluster.get("num_slices", 1), section(history, "train").get("batch", "?")
    listed = {
        "model": section(history, "model").get("name", "?"),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in found.mesh.items()),
        "slice": f"{f'{slices} × ' if slices != 1 else ''}{cluster.get('slice', '?')} ({cluster.get('kind', '?')})",
        "data": f"{data.get('source', '?')}, {data.get('sequence', '?')} tokens a row, {batch} rows a step",
        "git commit": found.git_commit or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }
    copied = {"a copy of run": found.id} if found.id != history.folder else {}
    return listed | copied | ({"begun from": parent(found.parent)} if found.parent else {})


def parent(found: dict[str, Any]) -> str:
    return f"run {found.get('id', '?')} at step {found.get('step', '?')}"


def commands(history: History) -> list[tuple[float, str, str, str, str]]:
    """Each command that worked on the run: when, its name, its overrides, how it ended, and how long until the next."""
    attempts = history.manifest.attempts
    starts = [*(attempt.time for attempt in attempts), math.inf]
    found = []
    for index, attempt in enumerate(attempts):
        lives = [one for one in history.controllers if starts[index] <= one.began < starts[index + 1]]
        following = [one.began for one in history.controllers if one.began >= starts[index + 1]]
        away = f"resumed {duration(following[0] - lives[-1].ended)} later" if lives and following else ""
        overrides = " ".join(map(str, attempt.overrides)) or "none"
        found.append((attempt.time, attempt.command, overrides, lives[-1].end if lives else "–", away))
    return found


def ledger(history: History) -> dict[str, Any]:
    """The buckets of goodput.json, each with its share of their sum, and what the sum is held against."""
    found = history.goodput.get("buckets")
    seconds = {str(name): number(value) for name, value in found.items()} if isinstance(found, dict) else {}
    total = sum(value for value in seconds.values() if value >= 0)
    if not total:
        return {}
    rows: list[dict[str, Any]] = []
    at = 0.0
    for name in ordered(list(seconds)):
        if seconds[name] >= 0:
            rows.append({"name": name, "s": seconds[name], "at": at, "share": seconds[name] / total})
            at += seconds[name] / total
    wall, lived = number(history.goodput.get("wall_s")), lived_s(history.controllers)
    spans = (("wall time in goodput.json", wall), ("first to last sign of each controller", lived))
    against = [f"{name}: {s:,.1f} s ({(total - s) / s:+.2%} in the sum)" for name, s in spans if s > 0]
    return {"rows": [row | {"means": MEANS.get(row["name"], "")} for row in rows], "total": total, "against": against}
