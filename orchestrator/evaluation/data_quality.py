"""The files of the quality table's benchmarks. Shots are documents of a split of their own, never of the scored one."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.evaluation.data import Document, NoDataError, Parts, documents, first, lines, table, whole


def mmlu(folder: Path) -> Parts:
    found: Parts = {}
    for split in ("dev", "test"):
        for one in documents(folder / "mmlu" / f"mmlu_{split}.jsonl"):
            found.setdefault(one["subject"], {"dev": [], "test": []})[split].append(one)
    return found


def hellaswag(folder: Path) -> Parts:
    """Shots, evenly over the file, whose halves are of two kinds: there is no file of training items."""
    every = []
    for one in documents(folder / "hellaswag" / "hellaswag_validation_rebuilt.jsonl"):
        activity = one["activity_label"]
        text = one["query"].removeprefix(f"{activity}: ")
        every.append({"activity_label": activity, "ctx_a": text, "ctx_b": "", "endings": one["endings"]})
        every[-1]["label"] = str(one["label"])
    shots = range(0, len(every), max(1, len(every) // 10))[:10]
    scored = [one for number, one in enumerate(every) if number not in shots]
    return {"hellaswag": {"train": [every[number] for number in shots], "validation": scored}}


def piqa(folder: Path) -> Parts:
    labels = [int(line) for line in lines(folder / "piqa" / "valid-labels.lst")]
    pairs = zip(documents(folder / "piqa" / "valid.jsonl"), labels, strict=True)
    return {"piqa": {"validation": [one | {"label": label} for one, label in pairs]}}


def social_iqa(folder: Path) -> Parts:
    return {"social_iqa": {"validation": list(documents(folder / "social_i_qa" / "social_i_qa_validation.jsonl"))}}


def boolq(folder: Path) -> Parts:
    return {"boolq": {"validation": list(documents(folder / "boolq" / "boolq_superglue_validation.jsonl"))}}


def winogrande(folder: Path) -> Parts:
    return {"winogrande": {"validation": list(documents(folder / "winogrande" / "winogrande_validation.jsonl"))}}


def arc_easy(folder: Path) -> Parts:
    return {"arc_easy": {"test": [lettered(one) for one in documents(folder / "arc" / "ARC-Easy_test.jsonl")]}}


def arc_challenge(folder: Path) -> Parts:
    shots = first(folder / "arc" / "ARC-Challenge_train.jsonl", 25)
    scored = documents(folder / "arc" / "ARC-Challenge_test.jsonl")
    return {"arc_challenge": {"train": [lettered(one) for one in shots], "test": [lettered(one) for one in scored]}}


def lettered(one: Document) -> Document:
    letters = "ABCDEFGH"[: len(one["choices"])]
    choices = {"text": one["choices"], "label": list(letters)}
    return {"id": one["id"], "question": one["question"], "choices": choices, "answerKey": letters[one["gold"]]}


def triviaqa(folder: Path) -> Parts:
    """Answers in these files are sets without order: the shots show the one that most of the others contain."""
    scored = [trivia(one) for one in documents(folder / "triviaqa" / "triviaqa_unfiltered_dev.jsonl")]
    known = {words(one["question"]) for one in scored}
    shots = []
    for one in documents(folder / "triviaqa" / "triviaqa_train_subset.jsonl"):
        if words(one["question"]) not in known:
            shots.append(trivia(one | {"answers": [plainest(one["answers"])]}))
        if len(shots) == 5:
            break
    return {"triviaqa": {"train": shots, "validation": scored}}


def trivia(one: Document) -> Document:
    return {"question": one["question"], "answer": {"aliases": one["answers"]}}


def words(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.lower()))


def plainest(answers: list[str]) -> str:
    """The one that most of the others contain as words; of several such a plain and short one."""

    def merit(one: str) -> tuple[int, bool, int]:
        words = re.compile(rf"\b{re.escape(one)}\b", re.IGNORECASE)
        inside = sum(words.search(other) is not None for other in answers)
        return inside, re.fullmatch(r"[\w ]+", one) is not None, -len(one)

    return max(answers, key=merit)


def natural_questions(folder: Path) -> Parts:
    shots = []
    for line in lines(folder / "natural_questions" / "topics.dpr.nq.dev.txt"):
        question, answers = line.rstrip("\r\n").split("\t")
        shots.append({"question": question, "answer": ast.literal_eval(answers)})
        if len(shots) == 5:
            break
    scored = list(documents(folder / "natural_questions" / "NQ-open.dev.jsonl"))
    return {"natural_questions": {"train": shots, "validation": scored}}


def humaneval(folder: Path) -> Parts:
    return {"humaneval": {"test": list(documents(folder / "humaneval" / "HumanEval.jsonl"))}}


def mbpp(folder: Path) -> Parts:
    """Tasks 1 to 10 are for prompts, 11 to 510 the test split."""
    every = list(documents(folder / "mbpp" / "mbpp.jsonl"))
    prompts = [one for one in every if one["task_id"] <= 10]
    return {"mbpp": {"prompt": prompts, "test": [one for one in every if 11 <= one["task_id"] <= 510]}}


def gsm8k(folder: Path) -> Parts:
    shots = first(folder / "gsm8k" / "train.jsonl", 5)
    return {"gsm8k": {"train": shots, "test": list(documents(folder / "gsm8k" / "test.jsonl"))}}


def math(folder: Path) -> Parts:
    found: Parts = {}
    for one in documents(folder / "math" / "test.json"):
        kind = one["type"].lower().replace(" & ", "_and_").replace(" ", "_")
        found.setdefault(kind, {"test": []})["test"].append(one)
    return found


AGIEVAL = (
    *("aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc"),
    *("math", "sat-en-without-passage", "sat-en", "sat-math"),
)


def agieval(folder: Path) -> Parts:
    """Of the sample rows of few_shot_prompts.csv, the questions and answers; not the explanations."""
    samples = [one for one in table(folder / "agieval" / "few_shot_prompts.csv") if one[""].startswith("sample")]
    found: Parts = {}
    for name in AGIEVAL:
        column = name.removesuffix("-without-passage")
        shots = [ast.literal_eval(one[column]) for one in samples if one[column]]
        if name != column:
            shots = [one | {"passage": None} for one in shots]
        scored = documents(folder / "agieval" / "v1" / f"{name}.jsonl")
        found[name] = {"train": exam_questions(shots), "test": exam_questions(scored)}
    return found


def exam_questions(found: Iterable[Document]) -> list[Document]:
    """Written as AGIEval's code (src/dataset_loader.py, convert_zero_shot) writes them."""
    made: list[Document] = []
    for one in found:
        asked = f"{one['passage'] or ''}Q: {one['question']}"
        if not one["options"]:
            made.append({"query": f"{asked}\nA: The answer is", "answer": one["answer"]})
            continue
        count = len(one["options"])
        offered = (
            f"Answer Choices: {' '.join(one['options'])}\nA: Among A through {'ABCDEFG'[count - 1]}, the answer is"
        )
        gold = ["ABCDEFG".index(one["label"])]
        made.append({"query": f"{asked} {offered}", "choices": one["options"], "gold": gold})
    return made


def bbh(folder: Path) -> Parts:
    """The prompts are lm-eval's own."""
    found: Parts = {}
    for path in sorted((folder / "bbh" / "bbh").glob("*.json*")):
        name = path.name.split(".")[0]
        file: Any = whole(path.with_name(f"{name}.json"))
        found[name] = {"test": file["examples"]}
    if not found:
        raise NoDataError(f"{folder / 'bbh' / 'bbh'}: no .json file is there")
    return found
