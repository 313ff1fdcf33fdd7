"""Results of an evaluation as text: a line a row of the model card; and several results side by side."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from textwrap import wrap
from typing import Any

from orchestrator.page.page import printable

WIDTH = 120  # characters of a line
SIZES = ("2B", "9B", "27B")
TITLES = {"quality": "Quality", "safety": "Safety"}
Z = NormalDist().inv_cdf(0.975)  # standard errors to either side that hold 95 %
DASH = "–"
LOWER = "↓"
OUTSIDE = "*"

Row = Mapping[str, Any]
Results = Mapping[str, Any]
Scores = Mapping[str, Mapping[tuple[str, int], float]]  # row, then part and document: 0 to 1


@dataclass(frozen=True)
class Difference:
    """The second less the first, in percent, over the documents that both have; one document has no interval: NaN."""

    documents: int
    mean: float
    low: float
    high: float


def text(results: Results) -> str:
    """The tables of one evaluation, its notes below them."""
    rows, size = results["rows"], size_of(results)
    numbers = numbered(rows)
    lines = [label(results), setting(results), *(f"WARNING: {line}" for line in warnings(results))]
    for name, those in tables(rows).items():
        lines += ["", *table(name, those, numbers, size)]
    keys = [f"{LOWER} lower is better"] if any(lower_is_better(row) for row in rows) else []
    if size and any(outside(row, size) for row in rows):
        keys.append(f"{OUTSIDE} the card's number of {size} lies outside the 95 % interval")
    said = [line for note, number in numbers.items() for line in hanging(f"({number}) ", note)]
    return "\n".join([*lines, *section(keys), *section(said)]) + "\n"


def compare(results: Sequence[Results], scores: Sequence[Scores]) -> str:
    """Several side by side, with the paired difference of each from the first that is not the card.

    results: {"card": "9B"} is the model card's. scores: of each of results; a card's are not looked at.
    """
    letters = [chr(ord("A") + index) for index in range(len(results))]
    first, *others = [index for index, result in enumerate(results) if "card" not in result] or [-1]
    found = [{row["name"]: row for row in result.get("rows", ())} for result in results]
    known = {name: row for rows in reversed(found) for name, row in rows.items()}
    rows = [known[name] for name in dict.fromkeys(name for rows in found for name in rows)]
    pairs = {
        name: [paired(scores[first].get(name, {}), scores[index].get(name, {})) for index in others] for name in known
    }
    lines = [f"{letter}  {label(result)}" for letter, result in zip(letters, results, strict=True)]
    for letter, result in zip(letters, results, strict=True):
        lines += [f"WARNING: {letter}: {line}" for line in warnings(result)]
    columns = [part for index in others for part in (f"{letters[index]} - {letters[first]} ", "pairs")]
    for title, those in tables(rows).items():
        digits = decimals(those)
        cells = [
            [
                titled(row),
                ways(row["name"], found),
                *(beside(result, of.get(row["name"]), row, digits) for result, of in zip(results, found, strict=True)),
                *(part for pair in pairs[row["name"]] for part in told(pair, digits)),
            ]
            for row in those
        ]
        lines += ["", *aligned([title, "how", *letters, *columns], cells)]
    keys = [f"{LOWER} lower is better"] if any(map(lower_is_better, rows)) else []
    if others:
        keys.append("differences: mean over the documents that both have (pairs), and its 95 % interval")
    if any(pair is not None and differs(pair) for those in pairs.values() for pair in those):
        keys.append(f"{OUTSIDE} 0 lies outside the interval")
    return "\n".join([*lines, *section(keys)]) + "\n"


def paired(first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float]) -> Difference | None:
    """By the normal approximation of the documents' differences. None where no document is in both."""
    both = [100 * (second[key] - first[key]) for key in first if key in second]
    both = [value for value in both if math.isfinite(value)]
    if not both:
        return None
    mean, half = fmean(both), Z * stdev(both) / math.sqrt(len(both)) if len(both) > 1 else math.nan
    return Difference(len(both), mean, mean - half, mean + half)


def differs(pair: Difference) -> bool:
    return pair.low > 0 or pair.high < 0


def told(pair: Difference | None, digits: int) -> tuple[str, str]:
    """The difference and how many pairs it is of."""
    if pair is None:
        return f"{DASH} ", ""
    within = f" [{signed(pair.low, digits)}, {signed(pair.high, digits)}]" if math.isfinite(pair.low) else ""
    return f"{signed(pair.mean, digits)}{within}{OUTSIDE if differs(pair) else ' '}", f"{pair.documents:,}"


def ways(name: str, found: Sequence[Mapping[str, Row]]) -> str:
    """How a row was asked: more than one where results differ in it."""
    return " / ".join(dict.fromkeys(rows[name]["how"] for rows in found if name in rows))


def beside(result: Results, row: Row | None, known: Row, digits: int) -> str:
    """What a result has of a row. known: the row as any result has it."""
    if "card" in result:
        return percent(published(known).get(result["card"]), digits)
    if row is None:
        return DASH
    return f"{percent(row['value'], digits)} {interval(row, digits)}" if is_done(row) else row["state"]


def table(name: str, rows: Sequence[Row], numbers: Mapping[str, int], size: str | None) -> list[str]:
    digits = decimals(rows)
    sizes = [one for one in SIZES if any(one in published(row) for row in rows)]
    share = any(row.get("contaminated") is not None for row in rows)
    header = [name, "how", "value", "95 %", "documents", *sizes]
    header += [f"vs {size} "] if size in sizes else []
    header += ["contaminated"] if share else []
    cells = []
    for row in rows:
        begun, mark = [titled(row), row["how"]], f"({numbers[row['note']]})" if row.get("note") else ""
        if not is_done(row):
            cells.append([*begun, f"{undone(row)} {mark}"])
            continue
        begun += [percent(row["value"], digits), interval(row, digits), f"{row['documents']:,}"]
        begun += [percent(published(row).get(one), digits) for one in sizes]
        begun += [against(row, size, digits)] if size and size in sizes else []
        begun += [percentage(row.get("contaminated"))] if share else []
        cells.append([*begun, mark])
    return aligned([*header, ""], cells)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Two columns flush left, the others right. A row of three is one that has no numbers: its text may take lines."""
    lines = [[clean(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[at]) for row in lines if at < 2 or len(row) == len(header)) for at in range(len(header))]
    shown = []
    for row in lines:
        begun = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False))
        if len(row) == len(header):
            ends = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            shown.append("  ".join([begun, *ends]).rstrip())
        else:
            shown += hanging(f"{begun}  ", row[2])
    return shown


def hanging(first: str, said: str) -> list[str]:
    """Lines of WIDTH; those after the first begin below where its text does."""
    width = max(WIDTH - len(first), WIDTH // 3)
    parts = wrap(clean(said), width, break_on_hyphens=False) or [""]
    return [f"{first}{parts[0]}".rstrip(), *(" " * len(first) + part for part in parts[1:])]


def section(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []


def clean(said: str) -> str:
    """One line that a terminal shows as it is."""
    return re.sub(r"\s", " ", printable(said))


def label(result: Results) -> str:
    """Which weights, evaluated by which run."""
    if "card" in result:
        return f"Gemma 2's model card, {clean(result['card'])}"
    step = "" if result.get("step") is None else f", step {result['step']}"
    chat = ", as a chat" if result.get("chat") else ""
    return clean(f"{result['model']}, weights {result['weights']}{step}{chat}; run {result['run']}")


def setting(results: Results) -> str:
    return clean(f"suite {results.get('suite') or DASH}; {computed(results)}")


def computed(results: Results) -> str:
    """On what, and in which numbers."""
    return ", ".join(str(results[key]) for key in ("platform", "dtype") if results.get(key)) or DASH


def warnings(results: Results) -> list[str]:
    """Why the numbers are not those of the whole benchmarks."""
    found = []
    if results.get("limit") is not None:
        found.append(f"at most {results['limit']:,} documents of each part were asked")
    if results.get("examples"):
        found.append("the documents are examples, not the benchmarks themselves")
    return found


def size_of(results: Results) -> str | None:
    """As the card names it, where it has numbers of it: gemma2_9b is 9B."""
    found = re.search(r"_(\d+b)(?![a-z0-9])", str(results.get("model", "")))
    size = found[1].upper() if found else None
    return size if any(size in published(row) for row in results["rows"]) else None


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By title, those of the model card first."""
    names = dict.fromkeys([*TITLES, *(row["table"] for row in rows)])
    found = {TITLES.get(name, name): [row for row in rows if row["table"] == name] for name in names}
    return {title: those for title, those in found.items() if those}


def numbered(rows: Sequence[Row]) -> dict[str, int]:
    """The notes, each once, in the order in which the tables come to them."""
    notes = dict.fromkeys(row["note"] for those in tables(rows).values() for row in those if row.get("note"))
    return {note: number for number, note in enumerate(notes, 1)}


def is_done(row: Row) -> bool:
    return bool(row["state"] == "done")


def undone(row: Row) -> str:
    return f"{row['state']}: {row['why']}" if row.get("why") else str(row["state"])


def published(row: Row) -> Mapping[str, float]:
    return row.get("published") or {}


def lower_is_better(row: Row) -> bool:
    return row.get("higher_is_better") is False


def titled(row: Row) -> str:
    return f"{row['title']} {LOWER}" if lower_is_better(row) else str(row["title"])


def outside(row: Row, size: str) -> bool:
    """Whether the card's number lies outside the row's interval."""
    low, high, number = row.get("low"), row.get("high"), published(row).get(size)
    return number is not None and low is not None and high is not None and not low <= number <= high


def apart(row: Row, size: str | None) -> float | None:
    """How far the value is from the card's number of a size."""
    number = published(row).get(size or "")
    return row["value"] - number if is_done(row) and row.get("value") is not None and number is not None else None


def against(row: Row, size: str, digits: int) -> str:
    found = apart(row, size)
    return f"{DASH} " if found is None else f"{signed(found, digits)}{OUTSIDE if outside(row, size) else ' '}"


def interval(row: Row, digits: int) -> str:
    if row.get("low") is None or row.get("high") is None:
        return ""
    return f"[{percent(row['low'], digits)}, {percent(row['high'], digits)}]"


def decimals(rows: Sequence[Row]) -> int:
    """As many as the card gives in this table."""
    return 2 if any(round(number, 1) != number for row in rows for number in published(row).values()) else 1


def percent(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # no -0.0


def percentage(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f} %"
