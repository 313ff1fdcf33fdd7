"""Minerva's four shots and its rules for answers, as lm-eval has them.

Its module asks on import for sympy and for an antlr that Hydra cannot live beside: it is read without its imports.
Answers are equal whose normalised texts are (Lewkowycz et al. 2022, appendix D), without lm-eval's algebra behind it.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any


@cache
def rules() -> dict[str, Any]:
    """What lm-eval's module defines."""
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / "minerva_math" / "utils.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.Try | ast.If)]
    names: dict[str, Any] = {}
    exec(compile(tree, str(path), "exec"), names)
    return names


def shots() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rules()["list_fewshot_samples"]()
    return found


def with_answers(docs: Any) -> Any:
    return docs.add_column("answer", [boxed(solution) for solution in docs["solution"]])


def boxed(solution: str) -> str:
    found: str = rules()["remove_boxed"](rules()["last_boxed_only_string"](solution))
    return normalised(found)


def normalised(answer: str) -> str:
    found: str = rules()["normalize_final_answer"](answer)
    return found


def results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    answer = normalised(rules()["get_unnormalized_answer"](results[0]))
    return {"exact_match": float(answer == doc["answer"])}
