"""What a finished evaluation leaves in its run directory: results.json, samples/, evaluation.html. Needs no lm-eval."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.evaluation import page, table
from orchestrator.record import rundir
from orchestrator.record.jsonfile import read_object

RESULTS, PAGE, SAMPLES = "results.json", "evaluation.html", "samples"


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """And the page, from the samples that lie there."""
    rundir.write_json(folder / RESULTS, dict(results))
    rundir.try_text(folder / PAGE, page.render(results, page.read_samples(folder / SAMPLES)))


def read(folder: Path) -> dict[str, Any] | None:
    return read_object(folder / RESULTS)


def lines(folder: Path) -> list[str]:
    """The table; none before all is answered."""
    found = read(folder)
    return [*table.text(found).splitlines(), f"page          {folder / PAGE}"] if found else []


def scores(folder: Path) -> dict[str, dict[tuple[str, int], float]]:
    """Of each document, by row, part and number."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for path in sorted((folder / SAMPLES).glob("*.jsonl")):
        by_document = found.setdefault(path.stem, {})
        with open(path) as file:
            for line in file:
                one = json.loads(line)
                by_document[one["part"], one["doc"]] = float(one["score"])
    return found


def for_wandb(results: Mapping[str, Any]) -> dict[str, float]:
    """A value and its interval for each row that is done, in percents."""
    done = [row for row in results["rows"] if row["state"] == "done"]
    names = {"": "value", "_low": "low", "_high": "high"}
    return {f"evaluation/{row['name']}{end}": row[key] for row in done for end, key in names.items()}
