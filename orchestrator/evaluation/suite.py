"""A suite of an evaluation: its rows rendered, its requests, what is answered, and what the answers are worth."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma.batching import rows as blocks
from gemma.config import ConfigError
from gemma.text import tokenizer as tokenizers
from gemma.text.tokenizer import Tokenizer
from orchestrator.config import Config
from orchestrator.evaluation import answers as ledger
from orchestrator.evaluation import contamination, requests, sandbox, tasks
from orchestrator.evaluation import judge as judging
from orchestrator.evaluation import results as written
from orchestrator.evaluation.answers import Answers
from orchestrator.evaluation.requests import Asked, Rendered
from orchestrator.evaluation.tasks import NoDataError, Row

Look = Callable[[], None]  # after each answer: at what may be done beside


@dataclass(frozen=True)
class Suite:
    config: Config
    folder: Path
    coder: Tokenizer
    rows: tuple[Row, ...]
    absent: Mapping[str, str]  # why a row is not asked, by name
    asked: Asked
    rendered: tuple[Rendered, ...]
    answers: Answers


def open_suite(config: Config, folder: Path, tell: Callable[[str], None]) -> Suite:
    """Renders all requests, and finds what is answered already. Raises ConfigError."""
    what = config.evaluate
    assert what is not None
    data = data_of(config)
    found = [tasks.read_row(name) for name in tasks.row_names(what.suite, what.tasks)]
    absent: dict[str, str] = {}
    parts: list[tuple[str, str, Any]] = []
    for row in found:
        if why := refusal(config, row):
            absent[row.name] = why
            continue
        try:
            for part in tasks.open_parts(row, data):
                part.task.build_all_requests(limit=what.limit, **chat_of(config))
                parts.append((row.name, part.name, part.task))
        except NoDataError as error:
            absent[row.name] = f"no data: {error}"
    coder = tokenizers.load(config.data.tokenizer)
    asked, rendered, too_long = requests.ask(parts, coder, config.model.context, what.block)
    absent |= {name: f"not run: {why}" for name, why in too_long.items()}
    if not rendered:
        told = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise ConfigError(f"evaluate.data={what.data}: nothing can be asked ({told})")
    blocks.save(asked.plan, folder / blocks.FILE)
    tell(
        f"{sum(len(one.scores) for one in rendered):,} scores and {len(asked.texts):,} texts of {len(found)} rows:"
        f" {asked.tokens:,} tokens, {computed_tokens(asked):,} of them computed"
    )
    answers = ledger.open_answers(folder, digest_of(config, asked))
    return Suite(config, folder, coder, tuple(found), absent, asked, tuple(rendered), answers)


def data_of(config: Config) -> Path | None:
    """The folder with the benchmarks' files. Raises ConfigError."""
    what = config.evaluate
    assert what is not None
    if what.data is None:
        return tasks.EXAMPLES if what.suite == "quick" else None
    folder = Path(what.data).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"evaluate.data={what.data}: no such folder")
    return folder


def refusal(config: Config, row: Row) -> str | None:
    """Why a row is not asked at all. Raises ConfigError where programs cannot be contained."""
    assert config.evaluate is not None
    if row.kind == "code":
        if not config.evaluate.run_code:
            return "not run: evaluate.run_code=true runs the programs that the model writes, in a sandbox"
        if why := sandbox.unavailable():
            raise ConfigError(f"evaluate.run_code=true: {why}")
    if row.kind == "toxicity":
        return "not run: there is no classifier of toxicity"
    return None


def chat_of(config: Config) -> dict[str, Any]:
    """What lm-eval is told of conversations."""
    assert config.evaluate is not None
    if not config.evaluate.chat:
        return {}
    return {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": requests.as_chat}


def digest_of(config: Config, asked: Asked) -> str:
    """Of all that answers depend on."""
    assert config.evaluate is not None
    facts = [asked.digest, config.evaluate.weights, config.evaluate.step, vars(config.model), config.train.dtype]
    facts += [config.filled_mesh.tensor, config.data.tokenizer]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def computed_tokens(asked: Asked) -> int:
    plan = asked.plan
    return len(plan.tokens) + len(plan.prefix) + sum(len(text.tokens) for text in asked.texts)


def contaminated(suite: Suite) -> set[contamination.Key]:
    """The documents, by part, whose questions stand in the training text."""
    questions = {
        (f"{one.row}/{one.part}", instance.doc_id): contamination.question_of(one.task, instance)
        for one in suite.rendered
        for instance, _ in (*one.scores, *one.texts)
    }
    return contamination.found_in(contamination.index_of(questions), contamination.texts_of(suite.config.data))


def facts(suite: Suite) -> dict[str, Any]:
    """For events.jsonl."""
    asked = suite.asked
    return {
        "rows": [row.name for row in suite.rows],
        "absent": dict(suite.absent),
        "blocks": asked.plan.blocks,
        "texts": len(asked.texts),
        "tokens": asked.tokens,
        "tokens_computed": computed_tokens(asked),
        "crossed": asked.crossed,
    }


def missing_blocks(suite: Suite) -> list[int]:
    return [block for block in range(suite.asked.plan.blocks) if block not in suite.answers.blocks]


def missing_texts(suite: Suite) -> list[int]:
    return [number for number in range(len(suite.asked.texts)) if number not in suite.answers.texts]


def left(suite: Suite) -> int:
    return len(missing_blocks(suite)) + len(missing_texts(suite))


def done(suite: Suite) -> int:
    return len(suite.answers.blocks) + len(suite.answers.texts)


def judge(suite: Suite) -> dict[str, Any]:
    """Writes results.json and the samples: the same bytes whenever all is answered."""
    scores: dict[int, tuple[float, bool]] = {}
    for block, found in suite.answers.blocks.items():
        scores |= dict(zip(suite.asked.plan.requests_of(block), found, strict=True))
    what = suite.config.evaluate
    assert what is not None
    judged = []
    seen = contaminated(suite) if what.contamination else None
    for row in suite.rows:
        if row.name in suite.absent:
            why = suite.absent[row.name]
            state = "no data" if why.startswith("no data") else "not run"
            judged.append(judging.absent(row, state, why.removeprefix("no data: ").removeprefix("not run: ")))
            continue
        parts = [one for one in suite.rendered if one.row == row.name]
        result, samples = judging.judge(row, parts, scores, suite.answers.texts)
        if seen is not None:
            judging.mark_contaminated(result, samples, seen)
        judging.write_samples(suite.folder / written.SAMPLES / f"{row.name}.jsonl", samples)
        judged.append(result)
    results = {
        "run": suite.folder.name,
        "model": suite.config.model.name,
        "weights": what.weights,
        "step": what.step,
        "suite": what.suite or ",".join(what.tasks),
        "chat": what.chat,
        "limit": what.limit,
        "examples": (data := data_of(suite.config)) is not None and tasks.is_examples(data),
        "dtype": suite.config.train.dtype,
        "digest": suite.asked.digest,
        "rows": judged,
    }
    written.write(suite.folder, results)
    return results
