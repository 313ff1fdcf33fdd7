"""An evaluation on one HTML page that needs nothing else: its tables, each row's parts, and samples to leaf through.

What a model or a benchmark wrote reaches the page only through the template's escaping, `tojson` or `textContent`.
"""

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from orchestrator.evaluation import table
from orchestrator.evaluation.table import Results, Row
from orchestrator.page.figures import duration
from orchestrator.page.page import FOLDER as REPORT
from orchestrator.page.page import digest, printable
from orchestrator.record.jsonfile import is_number, read_lines

FOLDER = Path(__file__).parent
SAMPLES = 40  # of a row, half of them right where there are as many
LETTERS = 4_000  # of a text of a sample
CHOICES = 40  # of a sample

Sample = Mapping[str, Any]


def render(results: Results, samples: Mapping[str, Sequence[Sample]]) -> str:
    """The page. samples: of each row, as read_samples gives them; rows without any have none to leaf through."""
    rows, size = results["rows"], table.size_of(results)
    numbers = table.numbered(rows)
    # The report's style, and what is here beside it: both pages look alike.
    style = f"{(REPORT / 'report.css').read_text()}\n{(FOLDER / 'page.css').read_text()}"
    script = (FOLDER / "page.js").read_text()
    drawn = {row["name"]: drawn_of(samples[row["name"]]) for row in rows if samples.get(row["name"])}
    return template().render(
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; script-src '{digest(script)}';"
        f" style-src '{digest(style)}'",
        style=style,
        script=script,
        data=drawn,
        results=results,
        size=size,
        sizes=[one for one in table.SIZES if any(one in table.published(row) for row in rows)],
        chance=any(is_number(row.get("chance")) for row in rows),
        warnings=table.warnings(results),
        tiles=tiles(results, size),
        facts=facts(results),
        tables={
            title: [shown(row, numbers, size, table.decimals(those), len(drawn.get(row["name"], ()))) for row in those]
            for title, those in table.tables(rows).items()
        },
        notes=[(number, note, titles(note, rows)) for note, number in numbers.items()],
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
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["place"] = place
    return environment.get_template("page.html")


def place(value: float) -> str:
    """On a scale from 0 to 100, as SVG takes it."""
    return f"{min(100.0, max(0.0, value)):.2f}%"


def tiles(results: Results, size: str | None) -> list[tuple[str, str]]:
    """Figures and what they are."""
    rows = results["rows"]
    done = [row for row in rows if table.is_done(row)]
    beside = [row for row in done if size in table.published(row) and row.get("low") is not None]
    inside = sum(not table.outside(row, size) for row in beside) if size else 0
    seconds = [row["seconds"] for row in rows if is_number(row.get("seconds"))]
    found = [
        (f"{len(done)} of {len(rows)}", "rows evaluated"),
        (f"{sum(row['documents'] for row in done):,}", "documents"),
    ]
    found += [(f"{inside} of {len(beside)}", f"intervals hold {size}'s number")] if beside else []
    return [*found, *([(duration(sum(seconds)), "time")] if seconds else [])]


def facts(results: Results) -> dict[str, str]:
    step = results.get("step")
    return {
        "weights": f"{results['weights']}{'' if step is None else f', step {step}'}",
        "asked": "as a chat" if results.get("chat") else "as plain text",
        "computed on": table.computed(results),
        "digest": str(results.get("digest") or table.DASH),
    }


def shown(row: Row, numbers: Mapping[str, int], size: str | None, digits: int, samples: int) -> dict[str, Any]:
    """A row as the template has it."""
    apart = table.apart(row, size)
    parts = [part for part in row.get("parts") or () if is_number(part.get("value"))]
    return {
        "row": row,
        "title": table.titled(row),
        "lower": table.lower_is_better(row),
        "done": table.is_done(row),
        "within": within(row),
        "undone": table.undone(row),
        "value": table.percent(row.get("value"), digits),
        "interval": table.interval(row, digits).strip("[]").replace(", ", " – "),
        "published": {one: table.percent(value, digits) for one, value in table.published(row).items()},
        "marks": sorted(table.published(row).items(), key=lambda mark: mark[0] == size),  # the model's own over others
        "apart": None if apart is None else table.signed(apart, digits),
        "look": look(row, apart, size),
        "contaminated": table.percentage(row.get("contaminated")) if is_number(row.get("contaminated")) else "",
        "note": numbers.get(row.get("note") or ""),
        "aside": aside(row, digits),
        "parts": sorted(parts, key=lambda part: part["value"], reverse=not table.lower_is_better(row)),
        "samples": samples,
    }


def within(row: Row) -> tuple[float, float] | None:
    """Where the interval begins on the scale, and its width; a normal approximation may reach beyond the scale."""
    low, high = number(row.get("low")), number(row.get("high"))
    if not table.is_done(row) or low is None or high is None:
        return None
    begin, end = (min(100.0, max(0.0, at)) for at in (low, high))
    return begin, end - begin


def look(row: Row, apart: float | None, size: str | None) -> str:
    """Whether a difference from the card is more than chance explains, and to which side."""
    if apart is None or size is None or not table.outside(row, size):
        return "even"
    return "better" if (apart > 0) != table.lower_is_better(row) else "worse"


def aside(row: Row, digits: int) -> list[str]:
    """What is told of a row that has been opened."""
    said = [f"metric {row['metric']}, {'lower' if table.lower_is_better(row) else 'higher'} is better"]
    if is_number(row.get("chance")):
        said.append(f"by chance {table.percent(row['chance'], digits)}")
    card = ", ".join(f"{one} {table.percent(value, digits)}" for one, value in table.published(row).items())
    said += [f"on the card {card}"] if card else []
    return said + ([duration(row["seconds"])] if is_number(row.get("seconds")) else [])


def titles(note: str, rows: Sequence[Row]) -> str:
    return ", ".join(row["title"] for row in rows if row.get("note") == note)


def read_samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each row that has a file in the folder. Files are read line by line: they may be larger than memory."""
    return {path.stem: drawn_of(read_lines(path)) for path in sorted(folder.glob("*.jsonl"))}


def drawn_of(found: Iterable[Sample]) -> list[dict[str, Any]]:
    """At most SAMPLES, in their order: as many right as wrong ones, more of one kind where the other has fewer.

    Which ones depends on the documents alone, so that two evaluations show the same of them where they can.
    """
    kept: dict[bool, list[tuple[int, int, Sample]]] = {True: [], False: []}
    for order, sample in enumerate(found):
        score = number(sample.get("score"))
        kind = kept[score is not None and score >= 0.5]
        one = (-rank(sample), order, sample)  # a heap: the highest rank is the first to go
        if len(kind) < SAMPLES:
            heapq.heappush(kind, one)
        else:
            heapq.heappushpop(kind, one)
    right, wrong = (sorted(kept[kind], reverse=True) for kind in (True, False))
    half = SAMPLES // 2
    chosen = right[: max(half, SAMPLES - len(wrong))] + wrong[: max(half, SAMPLES - len(right))]
    return [bounded(sample) for _, _, sample in sorted(chosen, key=lambda one: one[1])]


def rank(sample: Sample) -> int:
    """A number that chance might have given the document."""
    named = repr((sample.get("part"), sample.get("doc"))).encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest())


def bounded(sample: Sample) -> dict[str, Any]:
    found = sample.get("choices")
    pairs = [one for one in found if isinstance(one, list | tuple) and len(one) == 2] if isinstance(found, list) else []
    return {
        "part": cut(sample.get("part")),
        "doc": number(sample.get("doc")),
        **{name: cut(sample.get(name)) for name in ("prompt", "answer", "taken", "target")},
        "score": number(sample.get("score")),
        "choices": [[cut(text), number(value)] for text, value in pairs[:CHOICES]],
    }


def number(value: Any) -> float | None:
    return value if is_number(value) else None


def cut(found: Any) -> str:
    """The middle of a long text goes: a prompt ends with its question, an answer with its result."""
    text = "" if found is None else str(found)
    if len(text) <= LETTERS:
        return text
    kept = LETTERS - 50  # what remains is the mark's
    mark = f"\n[… {len(text) - kept:,} characters are left out here …]\n"
    return text[: kept // 4] + mark + text[len(text) - (kept - kept // 4) :]
