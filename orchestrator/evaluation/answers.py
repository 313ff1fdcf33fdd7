"""What was answered: a line a block of scores or a text in answers.jsonl. Nothing that is there is asked for again."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from gemma.config import ConfigError
from gemma.messages import Scores
from orchestrator.record.rundir import Appender

FILE = "answers.jsonl"


@dataclass
class Answers:
    file: Appender
    blocks: dict[int, tuple[tuple[float, bool], ...]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)


def open_answers(folder: Path, digest: str) -> Answers:
    """Those of an earlier controller too. digest: of all that the answers depend on. Raises ConfigError where they are
    answers to something else. What is not a whole line was never answered.
    """
    path = folder / FILE
    found, told = Answers(Appender(path)), False
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            if "digest" in row:
                told = True
                if row["digest"] != digest:
                    raise ConfigError(
                        f"run={folder.name}: its answers are to other requests, or of other weights ({row['digest']},"
                        f" now {digest}); begin another evaluation"
                    )
            elif "block" in row:
                found.blocks[int(row["block"])] = tuple((number(value), bool(greedy)) for value, greedy in row["found"])
            else:
                found.texts[int(row["text"])] = str(row["answer"])
        except (ValueError, KeyError, TypeError):
            continue
    if not told:
        found.file.write({"digest": digest})
    return found


def number(value: float | None) -> float:
    """JSON has no number that is not finite."""
    return math.nan if value is None else float(value)


def take_scores(answers: Answers, scores: Scores) -> None:
    if scores.block not in answers.blocks:
        answers.blocks[scores.block] = scores.found
        answers.file.write({"block": scores.block, "found": scores.found})


def take_text(answers: Answers, at: int, answer: str, tokens: int) -> None:
    if at not in answers.texts:
        answers.texts[at] = answer
        answers.file.write({"text": at, "answer": answer, "tokens": tokens})
