"""The rows of the Gemma 2 model card's two tables as lm-eval's tasks: rows/NAME.yaml laid over lm-eval's own.

lm-eval is imported when a row is opened, not before. With a folder of data nothing is asked of the network.
"""

import copy
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from gemma.config import ConfigError
from orchestrator.evaluation import data as files
from orchestrator.evaluation import data_quality, data_safety
from orchestrator.evaluation.data import Document, NoDataError, Splits

ROWS = Path(__file__).parent / "rows"
EXAMPLES = Path(__file__).parent / "examples"  # what `quick` can be asked of without any benchmark's data
QUALITY = (
    *("mmlu", "hellaswag", "piqa", "social_iqa", "boolq", "winogrande", "arc_easy", "arc_challenge", "triviaqa"),
    *("natural_questions", "humaneval", "mbpp", "gsm8k", "math", "agieval", "drop", "bbh"),
)
SAFETY = (
    *("realtoxicity", "crows_pairs", "bbq_ambig", "bbq_disambig", "winogender", "truthfulqa"),
    *("winobias_1_2", "winobias_2_2", "toxigen", "bold"),
)
SUITES = {
    "card": QUALITY + SAFETY,
    "quality": QUALITY,
    "safety": SAFETY,
    "quick": ("piqa", "boolq", "arc_easy", "gsm8k"),
}


@dataclass(frozen=True)
class Row:
    """A row of the card. Numbers are percents."""

    name: str
    title: str
    table: str  # quality | safety
    how: str  # as the card says it
    metric: str  # of those that the task gives for a document
    filter: str | None  # of lm-eval's, where a task has several
    higher_is_better: bool
    published: dict[str, float]  # by size of the model
    chance: float | None  # of a scorer to which all choices are alike; None where texts are written
    over: str  # the mean is over documents | parts
    kind: str  # choices | text | code | toxicity: how it is answered and judged
    data: str | None  # a function of data_quality or data_safety; None where no files of it are read
    parts: dict[str, dict[str, Any]]  # by name, with what is laid over its task; empty: the data says which there are
    program: Callable[[Document, str], tuple[str, str]] | None  # and its tests, of a document and an answer
    note: str  # where it leaves the card's protocol, or what the card does not say
    task: dict[str, Any]  # of lm-eval's TaskConfig; {part} is the part's name


@dataclass(frozen=True)
class Part:
    """A row, or one of its subjects."""

    name: str
    kind: str  # text in a row of choices where this part's answers are written
    task: Any  # lm_eval.api.task.ConfigurableTask


def row_names(suite: str | None, tasks: Sequence[str]) -> list[str]:
    """The suite's rows, and behind them the tasks that are not among them. Raises ConfigError."""
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"evaluate.suite={suite}: there is no such suite; allowed are {', '.join(SUITES)}")
    known = SUITES["card"]
    for name in tasks:
        if name not in known:
            raise ConfigError(f"evaluate.tasks={name}: there is no such row; allowed are {', '.join(known)}")
    if suite is None and not tasks:
        raise ConfigError(f"evaluate.suite=null: nothing to ask; allowed are {', '.join(SUITES)}, or evaluate.tasks")
    return list(dict.fromkeys([*(SUITES[suite] if suite else ()), *tasks]))


def is_examples(data: Path) -> bool:
    """Whether a folder has shipped examples, which only look like the benchmarks."""
    return (data / "EXAMPLES").is_file()


class RowLoader(yaml.SafeLoader):
    """Reads `!function module.name` as what rows/module.py has of that name."""


def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, name = loader.construct_scalar(node).split(".")
    return getattr(importlib.import_module(f"orchestrator.evaluation.rows.{module}"), name)


RowLoader.add_constructor("!function", function)


def read_row(name: str) -> Row:
    with open(ROWS / f"{name}.yaml", encoding="utf-8") as file:
        found = yaml.load(file, RowLoader)
    parts = found["parts"] or {}
    parts = {part: parts[part] or {} for part in parts} if isinstance(parts, dict) else {part: {} for part in parts}
    optional = {"filter": None, "program": None}
    return Row(name=name, **optional | found | {"parts": parts, "note": (found["note"] or "").strip()})


def open_parts(row: Row, data: Path | None) -> list[Part]:
    """Ready to be rendered, their shots fixed. data: a folder as in docs/evaluation-data.md; None asks the Hugging Face
    hub. Raises NoDataError.
    """
    found = None if data is None else read_files(row, data)
    names = list(row.parts or found or [row.name])
    if missing := [name for name in names if found is not None and name not in found]:
        raise NoDataError(f"{data}: {row.data} has no {missing[0]}")
    prepare(offline=data is not None)
    return [open_part(row, name, found[name] if found is not None else None) for name in names]


def read_files(row: Row, data: Path) -> files.Parts:
    if row.data is None:
        raise NoDataError(f"files of {row.name} are not read; without evaluate.data it comes from the Hugging Face hub")
    read: files.Read = getattr(data_quality, row.data, None) or getattr(data_safety, row.data)
    return files.parts(read, data)


def open_part(row: Row, name: str, splits: Splits | None) -> Part:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    config = config_of(row, name)
    if splits is None and not config.get("dataset_path"):
        raise NoDataError(f"{row.name} is read from files only: give evaluate.data")
    try:
        if splits is not None:
            tables = {split: datasets.Dataset.from_list(documents) for split, documents in splits.items()}
            config["custom_dataset"] = lambda **_: tables
        task = ConfigurableTask(config=config)
        settle(task)
    except Exception as error:  # the hub's libraries raise what they like, a template what its document lacks
        source = f"{row.data} in evaluate.data" if splits is not None else f"{config['dataset_path']} of the hub"
        told = " ".join(str(error).split())[:300]
        raise NoDataError(f"{source} cannot be opened ({type(error).__name__}: {told})") from error
    texts = row.kind == "choices" and task.OUTPUT_TYPE == "generate_until"
    return Part(name, "text" if texts else row.kind, task)


def config_of(row: Row, name: str) -> dict[str, Any]:
    """lm-eval's own, ours laid over it, the part's over both."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = copy.deepcopy(row.task) | row.parts.get(name, {})
    include = ours.pop("include", None)
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / include.format(part=name)) if include else {}
    merged = theirs | ours | {"task": row.name if name == row.name else f"{row.name}/{name}"}
    for key in ("tag", "task_alias"):
        merged.pop(key, None)
    if isinstance(merged.get("dataset_name"), str):
        merged["dataset_name"] = merged["dataset_name"].format(part=name)
    if not merged.get("num_fewshot"):  # else lm-eval looks for documents that shots could be of
        merged["fewshot_config"] = {"sampler": "first_n", "samples": []}
    return merged


def prepare(offline: bool) -> None:
    """lm-eval without its noise, each template compiled once, and no network where none is needed."""
    if offline:  # read when the libraries are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import datasets
    import lm_eval.api.task as lm_eval_task
    import lm_eval.utils as lm_eval_utils

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval_task.tqdm = without_bar
    templates = lm_eval_utils.env
    if not hasattr(templates.from_string, "cache_info"):  # lm-eval would compile one for each document
        templates.from_string = cache(templates.from_string)


def without_bar(documents: Any, **_: Any) -> Any:
    return documents


def settle(task: Any) -> None:
    """Processes documents and renders shots once: they stay the same, and lm-eval would do both again and again."""
    scored = task.config.test_split or task.config.validation_split
    task.dataset = {**task.dataset, scored: task.task_docs}
    task.config.process_docs = None
    if not task.config.num_fewshot:
        return
    shown, shots = task.fewshot_cfg, []
    for one in task.sampler.sample(task.config.num_fewshot):
        answer = task.doc_to_target(one, shown.doc_to_target)
        answer = answer[0] if isinstance(answer, list) else answer
        if isinstance(answer, int):
            answer = task.doc_to_choice(one, shown.doc_to_choice)[answer]
        shots.append({"question": task.doc_to_text(one, shown.doc_to_text), "answer": answer})
    task.sampler.df = shots
    shown.doc_to_text, shown.doc_to_target, shown.doc_to_choice = itemgetter("question"), itemgetter("answer"), None


def program_of(row: Row, document: Document, answer: str) -> tuple[str, str]:
    """What is run to judge an answer that is a program: it, and the tests behind it."""
    if row.program is None:
        raise ValueError(f"the answers of {row.name} are no programs")
    return row.program(document, answer)
