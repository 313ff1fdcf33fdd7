"""BBQ's ambiguous half with one shot: the first document of what is asked. What reads like it is not scored."""

from typing import Any


def shot(docs: Any) -> Any:
    return processed(ambiguous(docs).select([0]))


def scored(docs: Any) -> Any:
    found = ambiguous(docs)
    shown = (found[0]["context"], found[0]["question"])
    return processed(found.filter(lambda one: (one["context"], one["question"]) != shown))


def ambiguous(docs: Any) -> Any:
    return docs.filter(lambda one: one["context_condition"] == "ambig")


def processed(docs: Any) -> Any:
    from lm_eval.tasks.bbq import utils

    return utils.process_docs(docs)
