"""The programs that a model wrote, and the tests that are run after them."""

from typing import Any


def humaneval(doc: dict[str, Any], answer: str) -> tuple[str, str]:
    return doc["prompt"] + answer, f"{doc['test']}\ncheck({doc['entry_point']})"


def mbpp(doc: dict[str, Any], answer: str) -> tuple[str, str]:
    return answer, "\n".join([doc["test_setup_code"], *doc["test_list"]])


def shots_of_mbpp(docs: Any) -> list[dict[str, Any]]:
    """The paper's three of the tasks for prompts."""
    return [one for one in docs if one["task_id"] in (2, 3, 4)]
