"""A run on one HTML page that needs nothing else: no script, no font, no image, no network."""

import math
import time
from collections import deque
from collections.abc import Sequence

from orchestrator.page import bars, curves
from orchestrator.page.curves import Curve
from orchestrator.page.history import History, Row, number
from orchestrator.page.style import sheet
from orchestrator.page.svg import duration, figure, short, text
from orchestrator.record.goodput import BUCKETS

MEANS = {
    "step": "steps never done before",
    "replay": "steps done again after a failure",
    "reserve": "waiting for slices",
    "start": "host processes coming up",
    "data": "opening the text",
    "compile": "compiling or loading the step",
    "restore": "reading a checkpoint or snapshot",
    "eval": "held-out loss",
    "save": "steps held up by a checkpoint",
    "snapshot": "steps held up by a copy in host memory",
    "detect": "from a failure to knowing of it",
    "down": "clearing up after a failure",
    "other": "none of these",
}
LOOKS = {"finished": "good", "running": "busy", "stopped": "rest"}
INCIDENTS_SHOWN = 500
SMOOTHED = 8  # steps: those of one window come back together, so that one alone tells no speed


def page(history: History) -> str:
    found = history.manifest
    body = [header(history), training(history), timeline(history), incidents(history), ledger(history)]
    title = text(f"{found.id}: {history.state}")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{sheet()}</style></head>
<body><main>
{chr(10).join(body)}
<footer>python -m launch.report run={text(found.id)}</footer>
</main></body></html>
"""


def clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if math.isfinite(when) else "–"


def table(head: Sequence[tuple[str, str]], rows: Sequence[str], foot: str = "") -> str:
    """head: class and title of each column."""
    cells = "".join(f'<th class="{kind}">{text(title)}</th>' for kind, title in head)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody>{foot}</table></div>'


def cell(shown: object, kind: str = "") -> str:
    return f'<td class="{kind}">{text(shown)}</td>'


def final(rows: Sequence[Row]) -> list[Row]:
    """Each step as it came out last."""
    last = {row.step: row for row in rows}
    return [last[step] for step in sorted(last)]


def header(history: History) -> str:
    found, config = history.manifest, history.manifest.config
    rows = final(history.rows)
    last = rows[-1] if rows else None
    steps = config.get("train", {}).get("steps", "?")
    speeds = sorted(row.tokens_per_s for row in rows if math.isfinite(row.tokens_per_s))
    goodput = number(history.goodput.get("goodput"))
    tiles = [
        (f"{last.step if last else 0:,}", f"of {steps:,} steps" if isinstance(steps, int) else "steps"),
        (figure(last.loss if last else math.nan), "loss"),
        (figure(last.bits_per_byte if last else math.nan), "bits per byte"),
        (short(speeds[len(speeds) // 2]) if speeds else "–", "tokens/s, median"),
        (f"{goodput:.1%}" if math.isfinite(goodput) else "–", "goodput"),
        (str(history.goodput.get("restarts", "–")), "restarts"),
        (duration(number(history.goodput.get("wall_s"))), "wall time"),
    ]
    shown = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>' for value, name in tiles)
    look = LOOKS.get(history.state, "poor")
    badge = f'<span class="badge {look}">{text(history.state)}</span>'
    started = text(f"started {clock(found.created)} {time.strftime('%Z')}")
    return f"""<header><div class="top"><h1>{text(found.id)}</h1>{badge}</div><p class="soft">{started}</p></header>
<div class="tiles">{shown}</div>
<section><h2>Run</h2>{facts(history)}{commands(history)}</section>"""


def facts(history: History) -> str:
    found, config = history.manifest, history.manifest.config
    cluster, model = config.get("cluster", {}), config.get("model", {})
    slices = cluster.get("num_slices", 1)
    data, batch = config.get("data", {}), config.get("train", {}).get("batch", "?")
    listed = {
        "model": model.get("name", "?"),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in found.mesh.items()),
        "slice": f"{f'{slices} × ' if slices != 1 else ''}{cluster.get('slice', '?')} ({cluster.get('kind', '?')})",
        "data": f"{data.get('source', '?')}, {data.get('sequence', '?')} tokens a row, {batch} rows a step",
        "git commit": found.git_commit or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
    }
    if found.parent:
        listed["parent run"] = found.parent
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in listed.items())}</dl>"


def commands(history: History) -> str:
    """Each command that worked on the run, with its overrides and how it ended."""
    starts = [attempt.time for attempt in history.manifest.attempts]
    rows = []
    for attempt, following in zip(history.manifest.attempts, [*starts[1:], math.inf], strict=False):
        ends = [one.end for one in history.controllers if attempt.time <= one.began < following]
        overrides = f'<td class="fill"><code>{text(" ".join(attempt.overrides)) or "none"}</code></td>'
        cells = [
            cell(clock(attempt.time), "nw"),
            cell(attempt.command),
            overrides,
            cell(ends[-1] if ends else "–", "nw"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return "<h3>Commands</h3>" + table([("", "at"), ("", "command"), ("", "overrides"), ("", "ended")], rows)


def legend(*keys: tuple[str, str, str]) -> str:
    """class, style and name of each key."""
    shown = [f'<span><i class="key {kind}" style="{style}"></i>{text(name)}</span>' for kind, style, name in keys]
    return f'<div class="legend">{"".join(shown)}</div>'


def replaced(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that a later one of the same step made void, a list for each time through."""
    last = {row.step: index for index, row in enumerate(rows)}
    passes: list[list[Row]] = []
    for index, row in enumerate(rows):
        if last[row.step] != index:
            joins = passes and passes[-1][-1].step == row.step - 1 and passes[-1][-1].attempt == row.attempt
            if not joins:
                passes.append([])
            passes[-1].append(row)
    return passes


def bands(passes: Sequence[Sequence[Row]]) -> list[tuple[int, int]]:
    """First and last step of those done more than once, side by side ones as one."""
    found: list[tuple[int, int]] = []
    for step in sorted({row.step for one in passes for row in one}):
        if found and found[-1][1] == step - 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found


def speeds(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """tokens/s over the newest SMOOTHED steps of one attempt, up to each step."""
    found, newest = [], deque[Row](maxlen=SMOOTHED)
    for row in rows:
        if newest and newest[-1].attempt != row.attempt:
            newest.clear()
        if row.tokens_per_s > 0:
            newest.append(row)
        slowness = [1.0 / one.tokens_per_s for one in newest]
        found.append((row.step, len(slowness) / sum(slowness) if row.tokens_per_s > 0 else math.nan))
    return found


def training(history: History) -> str:
    rows, passes = final(history.rows), replaced(history.rows)
    again = bands(passes)
    turns = [
        (row.attempt, row.step - 1)
        for before, row in zip(history.rows, history.rows[1:], strict=False)
        if row.attempt != before.attempt
    ]
    wrong = [
        (row.step, "no finite loss" if row.ok else "its update was not applied")
        for row in sorted(history.rows, key=lambda row: row.step)
        if not row.ok or math.isnan(row.loss)
    ]
    evals = [(one.step, one.loss) for one in history.evals]
    loss = Curve(
        "loss",
        300.0,
        [(r.step, r.loss) for r in rows],
        [[(r.step, r.loss) for r in p] for p in passes],
        again,
        turns,
        evals,
        wrong,
    )
    speed = Curve(
        "tokens/s",
        200.0,
        speeds(rows),
        [speeds(p) for p in passes],
        again,
        turns,
        from_zero=True,
        digits=0,
    )
    keys = [("line", "color:var(--kept)", "counts")]
    if len(rows) > curves.PLOT_WIDTH:
        keys.append(("", "background:var(--kept);opacity:.3", "lowest to highest"))
    if passes:
        keys += [
            ("line", "color:var(--replaced)", "replaced: done again later"),
            ("", "background:var(--again)", "steps done again"),
        ]
    if turns:
        keys.append(("stroke", "", "a new attempt goes on"))
    if evals:
        keys.append(("turned", "background:var(--eval)", "eval loss"))
    if wrong:
        keys.append(("down", "", f"update not applied, or no finite loss ({len(wrong)})"))
    return f"""<section><h2>Training</h2>{legend(*keys)}
<h3>Loss, nats per token, over steps</h3><div class="wide">{curves.draw(loss)}</div>
<h3>Throughput, tokens/s, over steps: each with the {SMOOTHED - 1} before it</h3>
<div class="wide">{curves.draw(speed)}</div></section>"""


def timeline(history: History) -> str:
    there = {stretch.name for one in history.controllers for stretch in one.stretches}
    ordered = [*(name for name in BUCKETS if name in there), *sorted(there - set(BUCKETS))]
    keys = [(bars.kind(name), "", name) for name in ordered]
    several = len(history.controllers) > 1
    note = "Time during which a controller lived" + (", end to end; gray is the time between two." if several else ".")
    note += " Dots: checkpoints that became whole; diamonds: updates not applied."
    return f"""<section><h2>Timeline</h2><p class="note">{note}</p><div class="wide">{bars.timeline(history)}</div>
{legend(*keys)}</section>"""


def incidents(history: History) -> str:
    if not history.incidents:
        return '<section><h2>Incidents</h2><p class="soft">None.</p></section>'
    rows = []
    for index, one in enumerate(history.incidents[:INCIDENTS_SHOWN], 1):
        said = str(one.evidence)
        evidence = text(said)
        if len(said) > 140:
            evidence = f"<details><summary>{text(said[:120])}…</summary>{evidence}</details>"
        rank = "" if one.rank is None else f"rank {text(one.rank)}"
        lost = "" if one.steps_lost is None else f"{text(one.steps_lost)} step{'' if one.steps_lost == 1 else 's'} lost"
        took = [duration(number(value)) for value in (one.detect_s, one.restart_s, one.catch_up_s)]
        cells = [
            *(cell(index, "n"), cell(clock(number(one.time))[5:] or "–", "nw"), cell(one.attempt, "n")),
            cell(one.step, "n"),
            f'<td class="nw">{text(one.outcome)}<div class="soft">{rank}</div></td>',
            f'<td class="what">{evidence}<div class="soft">{text(one.decision)}</div></td>',
            f'<td class="nw">{text(one.source or "–")}<div class="soft">{lost}</div></td>',
            *(cell(seconds, "n") for seconds in took),
        ]
        rows.append(f'<tr id="incident-{index}">{"".join(cells)}</tr>')
    head = [("n", "#"), ("", "at"), ("n", "attempt"), ("n", "step"), ("", "outcome")]
    head += [("", "evidence and decision"), ("", "restored from")]
    head += [("n", "detect"), ("n", "restart"), ("n", "catch up")]
    left = len(history.incidents) - INCIDENTS_SHOWN
    more = f'<p class="note">and {left} more in goodput.json</p>' if left > 0 else ""
    return f"<section><h2>Incidents ({len(history.incidents)})</h2>{table(head, rows)}{more}</section>"


def ledger(history: History) -> str:
    found = history.goodput.get("buckets")
    told = {str(name): number(value) for name, value in found.items()} if isinstance(found, dict) else {}
    ordered = [*(name for name in BUCKETS if name in told), *(name for name in told if name not in BUCKETS)]
    buckets = [(name, told[name]) for name in ordered if told[name] >= 0]
    total = sum(seconds for _, seconds in buckets)
    if not total:
        return '<section><h2>Where the time went</h2><p class="soft">Nothing is told yet.</p></section>'
    rows = []
    for name, seconds in buckets:
        key = f'<td class="nw"><i class="key {bars.kind(name)}"></i>{text(name)}</td>'
        cells = [
            key,
            cell(f"{seconds:,.1f}", "n"),
            cell(f"{seconds / total:.1%}", "n"),
            cell(MEANS.get(name, ""), "soft"),
        ]
        faint = ' class="faint"' if seconds < 0.05 else ""
        rows.append(f"<tr{faint}>{''.join(cells)}</tr>")
    foot = f'<tfoot><tr><td>sum</td><td class="n">{total:,.1f}</td><td class="n">100.0%</td><td></td></tr></tfoot>'
    wall, lived = number(history.goodput.get("wall_s")), bars.worked(history.controllers)
    against = []
    for name, seconds in (
        ("wall time as told by goodput.json", wall),
        ("first to last sign of each controller", lived),
    ):
        if seconds > 0:
            against.append(f"{name}: {seconds:,.1f} s ({(total - seconds) / seconds:+.2%} in the sum)")
    head = [("", "bucket"), ("n", "seconds"), ("n", "share"), ("", "what it is")]
    return f"""<section><h2>Where the time went</h2><div class="wide">{bars.ledger(buckets)}</div>
{table(head, rows, foot)}
<p class="note">{text("; ".join(against))}.</p></section>"""
