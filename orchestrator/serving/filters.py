"""What a filter says of a prompt or an answer, as `content_filter_results`: texts in, names of categories out.

`off` finds nothing. `words` looks for words and phrases (glin-profanity). `shieldgemma` is the judgement of a model,
which `judging` asks by way of the router.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

JUDGED = ("hate", "self_harm", "sexual", "violence")
FOUND = ("jailbreak", "profanity")
ONLY_DETECTED = frozenset({"jailbreak"})  # told, and not filtered: phrases say too little
# What ShieldGemma's policies tell of the API's categories.
OF_POLICY = {
    "dangerous": ("self_harm", "violence"),
    "harassment": ("hate",),
    "hate": ("hate",),
    "sexual": ("sexual",),
}
LONGEST = 4  # times serve.filter_passage, for a passage that finds no end
NOTHING: frozenset[str] = frozenset()


def results(found: frozenset[str]) -> dict[str, Any]:
    """`content_filter_results` of a choice."""
    told: dict[str, Any] = {name: {"filtered": name in found} for name in JUDGED}
    return told | {name: {"filtered": name in found - ONLY_DETECTED, "detected": name in found} for name in FOUND}


def is_filtered(found: frozenset[str]) -> bool:
    return bool(found - ONLY_DETECTED)


def is_passage(text: str, least: int) -> bool:
    """Whether a text that goes on can be judged by itself: long enough, and ending between words."""
    return len(text) >= least and not text[-1:].isalnum() or len(text) >= LONGEST * least


def by_words(text: str) -> frozenset[str]:
    """Profanity in English, also spelt in other ways; and phrases that want instructions put aside."""
    profane, phrases = lists()
    return frozenset({"profanity"} if profane.is_profane(text) else ()) | frozenset(
        {"jailbreak"} if not phrases.scan(text).valid else ()
    )


@cache
def lists() -> tuple[Any, Any]:
    from glin_profanity import Filter  # what no other filter needs
    from glin_profanity.scanners import PromptInjectionScanner

    return Filter({"languages": ["english"]}), PromptInjectionScanner()


def by_policies(log_odds: Mapping[str, float], threshold: float) -> frozenset[str]:
    """log_odds: of Yes against No, by policy. threshold: of the probability of Yes among the two."""
    least = math.log(threshold / (1 - threshold))
    broken = [policy for policy, value in log_odds.items() if value >= least]
    return frozenset(name for policy in broken for name in OF_POLICY[policy])
