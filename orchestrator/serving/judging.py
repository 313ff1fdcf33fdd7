"""Asks the filter about a text: a list of words here, or the judge that runs beside the model served."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma.batching import schedule
from gemma.batching.plans import Sampling
from gemma.text import chat, shieldgemma
from orchestrator.serving import filters
from orchestrator.serving import router as routers

if TYPE_CHECKING:
    from orchestrator.serving.live import Front


JUDGE_S = 300.0  # between answers; hosts that come after others answer too


class JudgeError(Exception):
    """The judge could not be asked."""


async def judge(front: "Front", question: str, answer: str | None = None) -> frozenset[str]:
    """What the filter finds in a prompt, or in an answer to it. Raises JudgeError."""
    if front.serve.filter == "words":
        return filters.by_words(question if answer is None else answer)
    return filters.by_policies(await log_odds(front, question, answer), front.serve.filter_threshold)


async def log_odds(front: "Front", question: str, answer: str | None = None) -> dict[str, float]:
    """Of Yes against No, for each policy of ShieldGemma. What is longer than the judge's context is asked in parts, and
    the worst of them counts. Raises JudgeError.
    """
    limits, coder = front.router.limits[routers.JUDGE], front.coder
    yes_no = shieldgemma.answers(coder)
    asked, answered = chat.plain(question.strip(), coder), chat.plain((answer or "").strip(), coder)
    names, sequences = [], []
    for policy in shieldgemma.POLICIES:
        room = limits.context - 1 - len(shieldgemma.tokens(coder, policy, [], [] if answer is not None else None))
        for part, of_answer in parts(asked, answered if answer is not None else None, room):
            ids = shieldgemma.tokens(coder, policy, part, of_answer)
            for token in yes_no:
                names.append(policy)
                prompt = (*ids, token)
                number = next(front.router.numbers)
                sequences.append(schedule.Sequence(number, prompt, Sampling(), 0, frozenset(), len(prompt) - 1))
    request = routers.submit(front.router, sequences, routers.JUDGE)
    try:
        logprobs = await scores(request)
    except (asyncio.CancelledError, JudgeError):
        routers.cancel(front.router, request)
        raise
    odds = [yes - no for yes, no in zip(logprobs[::2], logprobs[1::2], strict=True)]
    return {
        policy: max(odd for name, odd in zip(names[::2], odds, strict=True) if name == policy)
        for policy in shieldgemma.POLICIES
    }


Ids = Sequence[int]


def parts(asked: Ids, answered: Ids | None, room: int) -> list[tuple[Ids, Ids | None]]:
    """Pieces of a prompt, or of an answer behind the end of its prompt, that go into so many tokens."""
    if answered is None:
        return [(asked[at : at + room], None) for at in range(0, max(1, len(asked)), room)]
    before = asked[-(room // 4) :]
    size = room - len(before)
    return [(before, answered[at : at + size]) for at in range(0, max(1, len(answered)), size)]


async def scores(request: routers.Request) -> list[float]:
    """The log-probability of each sequence's last token."""
    found: list[float | None] = [None] * len(request.sequences)
    while None in found:
        try:
            part = await asyncio.wait_for(request.parts.get(), JUDGE_S)
        except TimeoutError:
            raise JudgeError(f"no answer within {JUDGE_S:.0f} s") from None
        if part.scored is not None and part.scored.logprobs:
            found[part.choice] = part.scored.logprobs[0]
        elif part.ended is not None and found[part.choice] is None:
            raise JudgeError(part.ended)
    return [value for value in found if value is not None]
