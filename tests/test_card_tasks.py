"""The rows of the model card as tasks: documents, requests, shots, metrics. No model, no network."""

import functools
import gzip
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma.config import ConfigError
from orchestrator.evaluation import data_quality, tasks
from orchestrator.evaluation.rows import minerva
from orchestrator.evaluation.tasks import EXAMPLES, NoDataError, Part, Row

pytest.importorskip("lm_eval")

DATA = Path(__file__).parents[2] / "shared" / "data" / "eval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: the benchmarks' files")

# Documents that are scored, and choices of each; None: as many as the document has.
COUNTS: dict[str, tuple[int, int | None]] = {}
COUNTS |= {"mmlu": (14042, 4), "hellaswag": (10032, 4), "piqa": (1838, 2), "social_iqa": (1954, 3)}
COUNTS |= {"boolq": (3270, 2), "winogrande": (1267, 2), "arc_easy": (2376, None), "arc_challenge": (1172, None)}
COUNTS |= {"triviaqa": (11313, 1), "natural_questions": (3610, 1), "humaneval": (164, 1), "mbpp": (500, 1)}
COUNTS |= {"gsm8k": (1319, 1), "math": (5000, 1), "agieval": (3852, None), "bbh": (6511, 1)}
COUNTS |= {"realtoxicity": (5000, 1), "crows_pairs": (1508, 2), "bbq_ambig": (5971, 12), "bbq_disambig": (5978, 12)}
COUNTS |= {"winogender": (720, 2), "truthfulqa": (817, None), "winobias_1_2": (792, 2), "winobias_2_2": (792, 2)}
COUNTS |= {"toxigen": (31000, 1)}
PARTS = {"mmlu": 57, "math": 7, "agieval": 10, "bbh": 27, "bbq_ambig": 6, "bbq_disambig": 6, "toxigen": 31}
SHOTS = {"mmlu": 5, "hellaswag": 10, "arc_challenge": 25, "triviaqa": 5, "natural_questions": 5, "mbpp": 3, "gsm8k": 5}
SHOTS |= {"math": 4, "bbh": 3, "bbq_ambig": 1}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@functools.cache
def opened(name: str) -> tuple[Row, list[Part]]:
    row = tasks.read_row(name)
    return row, tasks.open_parts(row, DATA)


def built(part: Part, limit: int | None = 3) -> dict[int, list[Any]]:
    """Instances by document."""
    part.task.build_all_requests(limit=limit)
    found: dict[int, list[Any]] = {}
    for instance in part.task.instances:
        found.setdefault(instance.doc_id, []).append(instance)
    return found


def choices(task: Any, document: Any) -> list[str]:
    found: list[str] = task.doc_to_choice(document)
    return found


def test_each_row_of_the_card_has_its_file() -> None:
    assert {path.stem for path in tasks.ROWS.glob("*.yaml")} == set(tasks.SUITES["card"])
    assert set(COUNTS) == set(tasks.SUITES["card"]) - {"drop", "bold"}
    for name in tasks.SUITES["card"]:
        row = tasks.read_row(name)
        assert (row.name, row.table) == (name, "quality" if name in tasks.QUALITY else "safety")
        assert set(row.published) == ({"2B", "9B", "27B"} if name != "bold" else set())
        assert (row.chance is None) == (row.kind != "choices")
        assert row.over in ("documents", "parts")
        assert (row.program is None) == (row.kind != "code")
        assert "\n" not in row.note


def test_rows_are_named_by_suite_and_by_task() -> None:
    assert tasks.row_names("quick", []) == ["piqa", "boolq", "arc_easy", "gsm8k"]
    assert tasks.row_names("quick", ["mmlu", "piqa"]) == ["piqa", "boolq", "arc_easy", "gsm8k", "mmlu"]
    assert tasks.row_names(None, ["mmlu", "mmlu"]) == ["mmlu"]
    assert len(tasks.row_names("card", [])) == 27
    for suite, names, told in [
        ("cards", [], "evaluate.suite=cards: there is no such suite; allowed are card, quality, safety, quick"),
        ("card", ["hella"], "evaluate.tasks=hella: there is no such row; allowed are mmlu, hellaswag"),
        (None, [], "evaluate.suite=null: nothing to ask; allowed are card"),
    ]:
        with pytest.raises(ConfigError) as refused:
            tasks.row_names(suite, names)
        assert str(refused.value).startswith(told)
        assert "\n" not in str(refused.value)


def test_lm_eval_is_loaded_when_a_row_is_opened_and_with_files_it_has_no_network() -> None:
    code = """
import sys
from orchestrator.evaluation import tasks
row = tasks.read_row("piqa")
assert not {"lm_eval", "datasets"} & set(sys.modules)
tasks.open_parts(row, tasks.EXAMPLES)
import huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_OFFLINE
assert not {"torch", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_shipped_examples_are_told_from_the_benchmarks(tmp_path: Path) -> None:
    assert tasks.is_examples(EXAMPLES)
    assert not tasks.is_examples(tmp_path)
    for name, count in zip(tasks.SUITES["quick"], (40, 30, 30, 12), strict=True):
        (part,) = tasks.open_parts(tasks.read_row(name), EXAMPLES)
        assert len(part.task.eval_docs) == count
        check_shots(part, 5 if name == "gsm8k" else 0)
        if part.kind == "choices":
            labels = [part.task.doc_to_target(one) for one in part.task.eval_docs]
            even = count / len(choices(part.task, part.task.eval_docs[0]))
            assert all(abs(labels.count(label) - even) <= 1 for label in set(labels))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    def told(name: str) -> str:
        with pytest.raises(NoDataError) as refused:
            tasks.open_parts(tasks.read_row(name), tmp_path)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    for name in tasks.SUITES["card"]:
        assert (str(tmp_path) in told(name)) == (name != "drop")
    assert told("drop").startswith("files of drop are not read")
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    questions = tmp_path / "arc" / "ARC-Easy_test.jsonl"
    questions.write_text(questions.read_text()[:-20])
    assert f"{questions}: line 30 is not JSON" in told("arc_easy")
    questions.write_text('{"id": 1, "question": "Why?"}\n')
    assert told("arc_easy") == f"{tmp_path}: arc_easy is in a form that is not known (KeyError: 'choices')"
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    assert "piqa is in a form that is not known (ValueError: zip()" in told("piqa")
    questions.write_text('{"id": 1, "question": "Why?", "choices": [], "gold": 0}\n')
    assert told("arc_easy").startswith(f"{tmp_path}: arc_easy is in a form that is not known (IndexError")
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "How many?"}\n')
    assert told("gsm8k").startswith("gsm8k in evaluate.data cannot be opened (UndefinedError: 'answer' is undefined")
    shutil.copy(tmp_path / "gsm8k" / "train.jsonl", tmp_path / "gsm8k" / "test.jsonl")
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "How many?", "answer": "#### 1"}\n')
    assert "number of fewshot samples requested exceeds the 1 that are available" in told("gsm8k")
    packed = tmp_path / "boolq" / "boolq_superglue_validation.jsonl.gz"
    packed.write_bytes(gzip.compress(packed.with_suffix("").read_bytes()))
    packed.with_suffix("").unlink()
    (part,) = tasks.open_parts(tasks.read_row("boolq"), tmp_path)
    assert len(part.task.eval_docs) == 30
    packed.write_bytes(packed.read_bytes()[:-30])
    assert "boolq cannot be read" in told("boolq")
    (tmp_path / "mmlu").mkdir()
    for split in ("dev", "test"):
        document = {"question": "?", "subject": "anatomy", "choices": list("abcd"), "answer": 0}
        (tmp_path / "mmlu" / f"mmlu_{split}.jsonl").write_text(json.dumps(document) + "\n")
    assert told("mmlu") == f"{tmp_path}: mmlu has no abstract_algebra"


def test_without_files_the_hub_is_asked_and_what_it_does_not_have_is_named() -> None:
    code = """
import sys
from orchestrator.evaluation import tasks
for name in sys.argv[1:]:
    try:
        tasks.open_parts(tasks.read_row(name), None)
    except tasks.NoDataError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, "piqa", "mmlu", "winobias_1_2", "agieval"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=120)
    piqa, mmlu, *never = done.stdout.splitlines()
    assert piqa.startswith("baber/piqa of the hub cannot be opened (")
    assert mmlu.startswith("cais/mmlu of the hub cannot be opened (")
    assert never == [f"{name} is read from files only: give evaluate.data" for name in ("winobias_1_2", "agieval")]


@needs_data
@pytest.mark.parametrize("name", COUNTS)
def test_a_row_has_all_its_documents_and_each_all_its_choices(name: str) -> None:
    documents, offered = COUNTS[name]
    row, parts = opened(name)
    assert sum(len(part.task.eval_docs) for part in parts) == documents
    assert len(parts) == (2 if name.startswith("winobias") else PARTS.get(name, 1))
    for part in parts:
        for instances in built(part).values():
            if part.kind != "choices":
                assert [one.request_type for one in instances] == ["generate_until"]
                assert instances[0].args[1]["max_gen_toks"]
                continue
            assert {one.request_type for one in instances} == {"loglikelihood"}
            assert len(instances) == (offered or len(choices(part.task, instances[0].doc)))
            assert len({one.args for one in instances}) == len(instances)
            assert all(one.args[1].strip() for one in instances)
    kinds = {part.name: part.kind for part in parts}
    assert kinds == dict.fromkeys(kinds, row.kind) | ({"math": "text"} if name == "agieval" else {})


@needs_data
@pytest.mark.parametrize("name", [*SHOTS, "agieval"])
def test_shots_are_the_same_for_each_document_and_are_not_scored(name: str) -> None:
    row, parts = opened(name)
    for part in parts:
        check_shots(part, SHOTS.get(name) or row.parts[part.name]["num_fewshot"])


def check_shots(part: Part, count: int) -> None:
    task = part.task
    assert task.config.num_fewshot == count
    questions = [task.doc_to_text(one) for one in task.eval_docs]
    shots = [one["question"] for one in task.sampler.df] if count else []
    assert len(shots) == count
    assert not set(shots) & set(questions)
    if not count:
        return
    contexts = [instances[0].args[0] for instances in built(part).values()]
    beginnings = [context.removesuffix(question) for context, question in zip(contexts, questions, strict=False)]
    assert len(set(beginnings)) == 1
    assert len(beginnings[0]) < len(contexts[0])
    at = 0
    for shot in shots:
        at = beginnings[0].index(shot, at) + len(shot)


def definition(include: str, **how: Any) -> dict[str, Any]:
    """lm-eval's own."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(lm_eval.tasks.__file__).parent / include, **how)


def theirs(include: str, split: str, documents: Sequence[Any], **more: Any) -> Any:
    """A task of lm-eval's own definition over documents."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    config = definition(include)
    table = datasets.Dataset.from_list(list(documents))
    return ConfigurableTask(config={**config, **more, "custom_dataset": lambda **_: {split: table, "train": table}})


@needs_data
@pytest.mark.parametrize(
    "name", ["piqa", "social_iqa", "boolq", "winogrande", "arc_easy", "crows_pairs", "winogender", "truthfulqa"]
)
def test_without_shots_the_requests_are_those_of_lm_eval(name: str) -> None:
    row, (part,) = opened(name)
    few = part.task.eval_docs.select(range(20))
    split = part.task.config.test_split or part.task.config.validation_split
    more = {"validation_split": None} if split == "test" else {}
    task = theirs(row.task["include"], split, few, **more)
    task.build_all_requests()
    ours = [one.args for found in built(part, 20).values() for one in found]
    assert ours == [one.args for one in task.instances]


@needs_data
@pytest.mark.parametrize(
    ("name", "include"),
    [("arc_challenge", "arc/arc_challenge.yaml"), ("triviaqa", "triviaqa/default.yaml"), ("gsm8k", "gsm8k/gsm8k.yaml")],
)
def test_rendering_shots_once_changes_no_request(name: str, include: str) -> None:
    row, (part,) = opened(name)
    few = part.task.eval_docs.select(range(3))
    split = part.task.config.test_split or part.task.config.validation_split
    shots = {"num_fewshot": part.task.config.num_fewshot, "fewshot_split": "train"}
    task = theirs(include, split, few, **shots, fewshot_config={"sampler": "first_n"})
    task.sampler.df = list(part.task.dataset["train"])
    task.build_all_requests()
    assert [one.args[0] for found in built(part).values() for one in found] == [one.args[0] for one in task.instances]


@pytest.mark.parametrize(
    ("name", "include", "keys"),
    [
        ("humaneval", "humaneval/humaneval.yaml", ("doc_to_text", "doc_to_target")),
        ("mbpp", "mbpp/mbpp.yaml", ("doc_to_text", "target_delimiter")),
        ("math", "minerva_math/minerva_math_algebra.yaml", ("doc_to_target", "num_fewshot")),
    ],
)
def test_rows_that_are_written_here_read_as_lm_evals_do(name: str, include: str, keys: Sequence[str]) -> None:
    config = definition(include, resolve_func=False)
    task = tasks.read_row(name).task
    assert {key: task[key] for key in keys} == {key: config[key] for key in keys}
    assert task["generation_kwargs"]["until"] == config["generation_kwargs"]["until"]


# sha256 of all requests without shots, of the whole split in the order of random.Random(42), as JSON: of EleutherAI's
# lm-evaluation-harness, tests/testdata/NAME-loglikelihood at 4e7e0d4. They were made from the Hugging Face hub's data.
HASHES = {
    "piqa": "6048a3a2bb3ad1e6a3d98139618e06b4d7de766edd685bd38837596199c3f69f",
    "winogrande": "90a3eff49de9173964d46f5ed57bcf9a78a72dd1bfe0e5323b25cebb40b49ea9",
    "boolq": "6577e0d88572772ef08e64f624c0e3df0953286ae1f118ccef15623b59ffeabf",
    "arc_easy": "ffa6e39a35a16299dcb015f17f986aaa598ad8b4840c4cebe0339a7042232741",
    "arc_challenge": "41c34c96cca8ace661911d0033d630c554b283f5a3953bcdc50720ae6b00a9c1",
}


@needs_data
@pytest.mark.parametrize("name", HASHES)
def test_all_requests_without_shots_have_lm_evals_checksum(name: str) -> None:
    _, (part,) = opened(name)
    documents = list(part.task.eval_docs)
    random.Random(42).shuffle(documents)
    requests = []
    for one in documents:
        made = part.task.construct_requests(doc=one, ctx=part.task.fewshot_context(one, 0), metadata=("", 0, 1))
        requests += [instance.args for instance in (made[::-1] if name == "boolq" else made)]  # then " yes" came first
    assert hashlib.sha256(json.dumps(requests).encode()).hexdigest() == HASHES[name]


def right(task: Any, document: Any) -> set[int]:
    """Choices that are right."""
    if task.multiple_input:
        return {int(task.doc_to_text(document))}
    if (gold := document.get("gold")) and isinstance(gold, list):
        return set(gold)
    target = task.doc_to_target(document)
    return {target} if isinstance(target, int) else {choices(task, document).index(target)}


@needs_data
@pytest.mark.parametrize("name", [name for name, (_, offered) in COUNTS.items() if offered != 1])
def test_the_likeliest_choice_counts(name: str) -> None:
    row, parts = opened(name)
    for part in parts[:3]:
        if part.kind != "choices":
            continue
        for document in part.task.eval_docs.select(range(3)):
            options = choices(part.task, document)
            for best in range(len(options)):
                lengths = [len(one) if row.metric == "acc_norm" else 1 for one in options]
                answers = [(-1.0 * n if i == best else -20.0 * n, False) for i, n in enumerate(lengths)]
                value = part.task.process_results(document, answers)[row.metric]
                if name == "crows_pairs":
                    assert value == (best == 0)  # sent_more
                elif name == "truthfulqa":
                    assert value == pytest.approx(document["mc2_targets"]["labels"][best], abs=1e-6)
                elif name == "bbq_ambig":
                    assert value == (best >= 2)  # however it is said that it is not known
                else:
                    assert value == (best in right(part.task, document)), (document, best)


def taken(part: Part, answer: str, document: int = 0) -> dict[str, Any]:
    """Metrics of a text by each of the task's filters."""
    instances = built(part, document + 1)[document]
    instances[0].resps = [answer]
    part.task._instances = instances
    part.task.apply_filters()
    return {
        name: part.task.process_results(instances[0].doc, [found])
        for name, found in instances[0].filtered_resps.items()
    }


def score(name: str, part: Part, answer: str, document: int = 0) -> float:
    row, found = tasks.read_row(name), taken(part, answer, document)
    assert (row.filter in found) == (row.filter is not None)
    return float((found[row.filter] if row.filter else next(iter(found.values())))[row.metric])


def test_the_number_behind_the_hashes_counts() -> None:
    (part,) = tasks.open_parts(tasks.read_row("gsm8k"), EXAMPLES)
    assert part.task.eval_docs[1]["answer"].endswith("#### 240")
    assert score("gsm8k", part, " It drives 3 hours.\n#### 240", 1) == 1
    assert score("gsm8k", part, " It drives 3 hours.\n#### 24", 1) == 0
    assert score("gsm8k", part, " The answer is 240", 1) == 0


@needs_data
def test_written_answers_are_compared_as_lm_eval_compares_them() -> None:
    (trivia,) = opened("triviaqa")[1]
    alias = trivia.task.eval_docs[1]["answer"]["aliases"][-1]
    assert score("triviaqa", trivia, f" {alias.upper()}!", 1) == 1
    assert score("triviaqa", trivia, f" {alias} and more", 1) == 0
    (open_questions,) = opened("natural_questions")[1]
    assert score("natural_questions", open_questions, " the December 1972") == 1
    assert score("natural_questions", open_questions, " 1972") == 0
    logic = opened("bbh")[1][0]
    assert score("bbh", logic, f"... So the answer is {logic.task.eval_docs[0]['target']}.") == 1
    assert score("bbh", logic, "... So the answer is perhaps.") == 0


@pytest.mark.parametrize(
    ("answer", "said", "same"),
    [
        ("\\boxed{24}", "The final answer is $24$. I hope it is correct.", True),
        ("\\boxed{\\frac{1}{2}}", "The final answer is $\\frac12$. I hope it is correct.", True),
        ("\\boxed{[2,5)}", "The final answer is $[2,5)$. I hope it is correct.", True),
        ("\\boxed{[2,5)}", "The final answer is $[2,5)$.", False),  # the sentence is not whole
        ("\\boxed{12\\text{ cm}}", "The final answer is $12$ cm. I hope it is correct.", True),
        ("\\boxed{1,000}", "The final answer is $x = 1000$. I hope it is correct.", True),
        ("\\boxed{0.5}", "The final answer is $\\frac{1}{2}$. I hope it is correct.", False),  # no algebra
        ("\\boxed{24}", "The final answer is $25$. I hope it is correct.", False),
        ("\\boxed{24}", "24", False),
    ],
)
def test_minervas_rules(answer: str, said: str, same: bool) -> None:
    document = {"answer": minerva.boxed(f"So it is ${answer}$.")}
    said = said.replace("The final", "Final Answer: The final")
    assert minerva.results(document, [f" By algebra.\n{said}"]) == {"exact_match": float(same)}


def test_a_program_goes_with_its_tests() -> None:
    human: dict[str, Any] = {"prompt": "def two():\n", "entry_point": "two"}
    human["test"] = "def check(f):\n    assert f() == 2"
    basic = {"test_setup_code": "n = 2", "test_list": ["assert two() == n", "assert two() < 3"]}
    for name, document, begun in (("humaneval", human, ""), ("mbpp", basic, "def two():\n")):
        row = tasks.read_row(name)
        exec("\n".join(tasks.program_of(row, document, f"{begun}    return 2")), {})
        with pytest.raises(AssertionError):
            exec("\n".join(tasks.program_of(row, document, f"{begun}    return 3")), {})
    with pytest.raises(ValueError, match="no programs"):
        tasks.program_of(tasks.read_row("piqa"), {}, "")


@needs_data
def test_a_pronoun_is_asked_for_with_both_candidates() -> None:
    for name in ("winobias_1_2", "winobias_2_2"):
        _, parts = opened(name)
        assert [part.name for part in parts] == ["pro", "anti"]
        labels = [one["label"] for part in parts for one in part.task.eval_docs]
        assert 0.45 < sum(labels) / len(labels) < 0.55  # the order of candidates says nothing
        assert not any(set("[]") & set(one["sentence"]) for part in parts for one in part.task.eval_docs)
    _, (part,) = opened("winogender")
    assert {one["pronoun"] for one in part.task.eval_docs} == {
        *("he", "she", "they", "his", "her", "their", "him", "them")
    }
    for one in part.task.eval_docs:
        assert f" {one['pronoun']}" in one["sentence"].lower()
        assert one["occupation"] in one["sentence"]


def test_bold_is_read_where_there_is_a_folder_of_it(tmp_path: Path) -> None:
    (tmp_path / "bold" / "prompts").mkdir(parents=True)
    for name in ("gender", "race"):
        file = tmp_path / "bold" / "prompts" / f"{name}_prompt.json"
        prompts = {"bakers": {"A_Baker": ["A Baker is a ", "Baker bakes "]}, "millers": {"M": ["M mills "]}}
        file.write_text(json.dumps(prompts))
    parts = tasks.open_parts(tasks.read_row("bold"), tmp_path)
    assert [(part.name, len(part.task.eval_docs), part.kind) for part in parts] == [
        ("gender", 3, "toxicity"),
        ("race", 3, "toxicity"),
    ]
    assert built(parts[0])[0][0].args[0] == "A Baker is a"


@needs_data
def test_agieval_asks_as_its_own_code_does() -> None:
    row, parts = opened("agieval")
    by_name = {part.name: part.task for part in parts}
    assert list(by_name) == list(data_quality.AGIEVAL)
    asked = by_name["sat-math"].eval_docs[0]["query"]
    assert asked.startswith(
        "Q: If $\\frac{x-1}{3}=k$ and $k=3$, what is the value of $x ?$ Answer Choices: (A)2 (B)4 (C)9"
    )
    assert asked.endswith(" (D)10\nA: Among A through D, the answer is")
    assert by_name["math"].eval_docs[0]["query"].endswith("\nA: The answer is")
    for one, other in zip(by_name["sat-en"].sampler.df, by_name["sat-en-without-passage"].sampler.df, strict=True):
        assert one["question"].endswith(other["question"])
        assert other["question"].startswith("Q: ")
        assert one["answer"] == other["answer"]
        assert one["answer"][:2] in ("(A", "(B", "(C", "(D")
    assert by_name["math"].sampler.df[0]["answer"] == "[2,5)"


@needs_data
def test_a_pair_of_sentences_stands_alone() -> None:
    _, (part,) = opened("crows_pairs")
    assert all(one.args[0] == "" for instances in built(part).values() for one in instances)


@needs_data
@pytest.mark.soak
@pytest.mark.parametrize("name", COUNTS)
def test_whole_rows_are_rendered(name: str) -> None:
    _, parts = opened(name)
    for part in parts:
        assert len(built(part, None)) == len(part.task.eval_docs)
