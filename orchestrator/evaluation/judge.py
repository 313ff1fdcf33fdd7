"""What answers are worth: lm-eval's filters and metrics over what was answered, with 95 % intervals. Touches no device.

The same answers give the same bytes. A program that a model has written is run here, in the sandbox, and nowhere else.
"""

import json
import math
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.evaluation import sandbox, tasks
from orchestrator.evaluation.requests import CHAT, Rendered
from orchestrator.evaluation.tasks import Row

Z = 1.959963984540054  # of 95 %
Document = dict[str, Any]  # a line of samples/ROW.jsonl


def judge(
    row: Row, parts: Sequence[Rendered], scores: Mapping[int, tuple[float, bool]], texts: Mapping[int, str]
) -> tuple[dict[str, Any], list[Document]]:
    """The row of results.json, and its documents in order. Values are percents."""
    documents: list[Document] = []
    for part in parts:
        documents += judged_part(row, part, scores, texts)
    if row.kind == "code":
        run_programs(row, documents)
    by_part: dict[str, list[float]] = {}
    for one in documents:
        by_part.setdefault(one["part"], []).append(one["score"])
    value, low, high = interval(list(by_part.values()), row.over)
    shown_parts = [
        {"name": name, "value": 100 * statistics.fmean(found), "documents": len(found)}
        for name, found in by_part.items()
    ]
    result = head(row) | {
        "state": "done",
        "value": 100 * value,
        "low": 100 * low,
        "high": 100 * high,
        "documents": len(documents),
        "parts": shown_parts if len(shown_parts) > 1 else [],
        "contaminated": None,
    }
    for one in documents:
        one.pop("program", None)
    return result, documents


def mark_contaminated(result: dict[str, Any], documents: Sequence[Document], seen: Collection[tuple[str, int]]) -> None:
    """seen: row/part and number of the documents that stand in the training text."""
    for one in documents:
        one["contaminated"] = (f"{result['name']}/{one['part']}", one["doc"]) in seen
    result["contaminated"] = statistics.fmean(one["contaminated"] for one in documents)


def head(row: Row) -> dict[str, Any]:
    names = ("name", "title", "table", "how", "metric", "higher_is_better", "chance", "published", "note")
    return {name: getattr(row, name) for name in names}


def absent(row: Row, state: str, why: str) -> dict[str, Any]:
    """A row that was not asked is a row all the same."""
    return head(row) | {"state": state, "why": why, "parts": [], "contaminated": None}


def judged_part(
    row: Row, part: Rendered, scores: Mapping[int, tuple[float, bool]], texts: Mapping[int, str]
) -> list[Document]:
    task = part.task
    for instance, number in part.scores:
        instance.resps = [scores[number]]
    for instance, number in part.texts:
        instance.resps = [texts[number]]
    task.apply_filters()
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    found = []
    for number, instances in sorted(by_document.items()):
        instances.sort(key=lambda one: one.idx)
        filtered = instances[0].filtered_resps
        name = row.filter if row.filter in filtered else next(iter(filtered))
        answers = [one.filtered_resps[name] for one in instances]
        one = described(task, part.part, number, instances, answers)
        if row.kind == "code":
            one["program"] = tasks.program_of(row, instances[0].doc, str(instances[0].resps[0]))
            one["score"] = 0.0
        else:
            one["score"] = float(task.process_results(instances[0].doc, answers)[row.metric])
        found.append(one)
    return found


def described(task: Any, part: str, number: int, instances: Sequence[Any], answers: Sequence[Any]) -> Document:
    first = instances[0]
    made: Document = {"part": part, "doc": number, "prompt": prompt_of(first.args[0]), "target": target_of(task, first)}
    if first.request_type == "generate_until":
        return made | {"answer": str(first.resps[0]), "taken": str(answers[0])[:200]}
    same = len({one.args[0] for one in instances}) == 1  # else the choices stand in the contexts
    choices = [
        (one.args[1] if same else one.args[0][-200:] + one.args[1], float(answer[0]))
        for one, answer in zip(instances, answers, strict=True)
    ]
    best = max(choices, key=lambda choice: choice[1], default=("", 0.0))
    return made | {"answer": best[0], "choices": [list(choice) for choice in choices]}


def prompt_of(context: str) -> str:
    if not context.startswith(CHAT):
        return context
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in json.loads(context.removeprefix(CHAT)))


def target_of(task: Any, instance: Any) -> str:
    target = task.doc_to_target(instance.doc)
    if isinstance(target, int) and not isinstance(target, bool) and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(instance.doc)
        return str(choices[target]) if 0 <= target < len(choices) else str(target)
    return str(target[0] if isinstance(target, list) and target else target)


def run_programs(row: Row, documents: list[Document]) -> None:
    verdicts = sandbox.run_all([one["program"] for one in documents])
    for one, verdict in zip(documents, verdicts, strict=True):
        one["score"], one["taken"] = float(verdict.passed), verdict.why


def interval(parts: Sequence[Sequence[float]], over: str) -> tuple[float, float, float]:
    """A mean with its 95 % interval: over all documents (Wilson's where each is right or wrong), or over parts."""
    if over == "parts" and len(parts) > 1:
        value = statistics.fmean(statistics.fmean(part) for part in parts)
        error = math.sqrt(sum(variance(part) / len(part) for part in parts)) / len(parts)
        return value, max(0.0, value - Z * error), min(1.0, value + Z * error)
    scores = [score for part in parts for score in part]
    value, count = statistics.fmean(scores), len(scores)
    if not all(score in (0.0, 1.0) for score in scores):
        error = math.sqrt(variance(scores) / count)
        return value, max(0.0, value - Z * error), min(1.0, value + Z * error)
    middle = (value + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
    return value, min(value, middle - half), max(value, middle + half)  # equal at 0 and 1, but for rounding


def variance(scores: Sequence[float]) -> float:
    return statistics.variance(scores) if len(scores) > 1 else 0.0


def write_samples(path: Path, documents: Iterable[Document]) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with open(partial, "w") as file:
        for one in documents:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
    partial.rename(path)
