"""One request on its way to its client: tokens become text, text is judged, and comes whole or as a stream."""

import asyncio
import hashlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from gemma.batching import schedule
from gemma.config import Serve
from gemma.text import stream as streams
from gemma.text.stream import TextStream
from gemma.text.tokenizer import Tokenizer
from orchestrator.config import Config
from orchestrator.serving import api, filters, judging, limits
from orchestrator.serving import router as routers
from orchestrator.serving.api import Usage, Wanted
from orchestrator.serving.judging import JudgeError
from orchestrator.serving.limits import Spent
from orchestrator.serving.router import Router

PING_S = 15.0  # a comment in a stream that has nothing to say, so that nothing between here and the client ends it
UNJUDGED = "serve.filter could not be asked: {}"
ENDS = ("stop", "length", "content_filter")


@dataclass(frozen=True)
class Front:
    config: Config
    serve: Serve
    router: Router
    coder: Tokenizer
    keys: frozenset[bytes]  # digests; empty: nobody is asked for one
    facts: str  # of weights, config and version, but for the step
    started: float
    spent: dict[bytes, Spent] = field(default_factory=dict)  # by key

    @property
    def fingerprint(self) -> str:
        return "fp_" + hashlib.sha256(f"{self.facts} {self.router.step}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Change:
    """What is new of a choice: text, its tokens' logprobs, how it ended."""

    choice: int
    text: str
    logprobs: list[dict[str, Any]] | None
    reason: str | None  # of ENDS, or an error in words

    def and_then(self, later: "Change") -> "Change":
        logprobs = [*(self.logprobs or []), *(later.logprobs or [])] or None
        return Change(self.choice, self.text + later.text, logprobs, later.reason)


def problem(
    message: str, status: int, param: str | None = None, code: str | None = None, retry_s: float = 1.0
) -> JSONResponse:
    headers = {"Retry-After": str(math.ceil(retry_s))} if status in (429, 503) else {}
    return JSONResponse(api.error_body(message, status, param, code), status, headers)


class Live:
    """One request on its way to its client."""

    def __init__(
        self,
        front: Front,
        wanted: Wanted,
        sequences: Sequence[schedule.Sequence],
        question: str,
        prompt_tokens: Sequence[int],
        spent: Spent,
    ):
        self.spent = spent
        self.front, self.wanted, self.sequences = front, wanted, tuple(sequences)
        self.question, self.prompt_tokens = question, prompt_tokens
        self.head = api.new_head(wanted, front.fingerprint)
        self.request: routers.Request | None = None  # once it is known that it may be asked
        self.texts = [TextStream(front.coder, wanted.stops) for _ in sequences]
        self.reasons: list[str | None] = [None] * len(sequences)
        self.completion = [0] * len(sequences)
        self.offset = [0] * len(sequences)  # characters whose logprobs were told
        self.found = [filters.NOTHING] * len(sequences)  # of the filter, in prompt and answer

    async def begin(self) -> None:
        """Asks for an answer, unless the prompt is filtered. Raises JudgeError."""
        if self.front.serve.filter != "off":
            self.found = [await judging.judge(self.front, self.question)] * len(self.texts)
        if not filters.is_filtered(self.found[0]):
            self.request = routers.submit(self.front.router, self.sequences)

    async def changes(self) -> AsyncIterator[Change | None]:
        """What is to be sent; None where nothing came for PING_S. Where there is a filter the answer comes in passages
        that were judged, and ends with the first that was filtered.
        """
        if self.request is None:
            for choice in range(len(self.texts)):
                self.reasons[choice] = "content_filter"
                yield Change(choice, "", None, "content_filter")
            return
        judged = self.front.serve.filter != "off"
        held, sent = [Change(n, "", None, None) for n in range(len(self.texts))], [""] * len(self.texts)
        async for change in self.parts():
            if change is None or not judged or change.reason not in (None, *ENDS):
                yield change
                continue
            choice = change.choice
            whole = held[choice] = held[choice].and_then(change)
            if change.reason is None and not filters.is_passage(whole.text, self.front.serve.filter_passage):
                continue
            sent[choice] += whole.text
            held[choice] = Change(choice, "", None, None)
            self.found[choice] |= await judging.judge(self.front, self.question, sent[choice])
            if filters.is_filtered(self.found[choice]):
                self.end_choice(choice)
                self.reasons[choice] = "content_filter"
                whole = Change(choice, "", None, "content_filter")
            yield whole

    async def parts(self) -> AsyncIterator[Change | None]:
        """What the replicas bring; None where nothing came for PING_S."""
        assert self.request is not None
        while None in self.reasons:
            try:
                part = await asyncio.wait_for(self.request.parts.get(), PING_S)
            except TimeoutError:
                yield None
                continue
            if self.reasons[part.choice] is None and (change := self.taken(part)) is not None:
                yield change

    def taken(self, part: routers.Part) -> Change | None:
        stream, tokens = self.texts[part.choice], part.chosen.tokens if part.chosen else ()
        self.completion[part.choice] += len(tokens)
        text = streams.add(stream, tokens)
        reason = part.ended
        if stream.stopped is not None:
            reason = "stop"
            self.end_choice(part.choice)
        elif reason is not None:
            text += streams.end(stream)
            reason = "stop" if stream.stopped is not None else reason
        self.reasons[part.choice] = reason
        logprobs = self.logprobs(part) if self.wanted.sampling.logprobs is not None and part.chosen else None
        return Change(part.choice, text, logprobs, reason) if text or reason or logprobs else None

    def end_choice(self, choice: int) -> None:
        """A stop string was met: its sequence need not go on."""
        if self.request is not None:
            routers.cancel(self.front.router, replace(self.request, sequences=(self.request.sequences[choice],)))

    def logprobs(self, part: routers.Part) -> list[dict[str, Any]]:
        assert part.chosen is not None
        coder, count = self.front.coder, self.wanted.sampling.logprobs or 0
        return [
            named(coder, token, value) | {"top_logprobs": [named(coder, t, v) for t, v in top[:count]]}
            for token, value, top in zip(part.chosen.tokens, part.chosen.logprobs, part.chosen.top, strict=True)
        ]

    async def events(self) -> AsyncIterator[bytes]:
        """The stream, to `data: [DONE]`. A client that goes away cancels this, and with it the sequences."""
        kind = "chat.completion.chunk" if self.head.chat else "text_completion"

        def chunk(*choices: dict[str, Any]) -> bytes:
            found = api.envelope(self.head, kind, choices)
            return api.event(found | ({"usage": None} if self.wanted.include_usage else {}))

        try:
            await self.begin()
            if self.head.chat:
                for index in range(len(self.texts)):
                    yield chunk(api.part_choice(self.head, index, {"role": "assistant"}, self.filters(index)))
            async for change in self.changes():
                if change is None:
                    yield b": waiting\n\n"
                    continue
                index, reason = change.choice, change.reason
                if reason not in (None, *ENDS):
                    yield api.event(api.error_body(str(reason), 503))
                    return
                told = self.filters(index)
                if change.text or change.logprobs:
                    more = {"content": change.text}
                    yield chunk(
                        api.part_choice(self.head, index, more, told, None, self.shaped(index, change.logprobs))
                    )
                if reason:
                    yield chunk(api.part_choice(self.head, index, {}, told, reason))
            if self.wanted.include_usage:
                yield api.event(api.envelope(self.head, kind, ()) | {"usage": self.usage().as_json()})
            yield api.DONE
        except JudgeError as error:
            yield api.event(api.error_body(UNJUDGED.format(error), 503))
        finally:
            self.close()

    async def whole(self) -> Response:
        texts = [""] * len(self.texts)
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self.texts]
        try:
            await self.begin()
            async for change in self.changes():
                if change is None:
                    continue
                if change.reason not in (None, *ENDS):
                    return problem(str(change.reason), 503)
                texts[change.choice] += change.text
                logprobs[change.choice] += change.logprobs or []
        except JudgeError as error:
            return problem(UNJUDGED.format(error), 503)
        finally:
            self.close()
        asked = self.wanted.sampling.logprobs is not None
        choices = [
            api.whole_choice(self.head, n, text, self.filters(n), str(reason), self.shaped(n, found) if asked else None)
            for n, (text, reason, found) in enumerate(zip(texts, self.reasons, logprobs, strict=True))
        ]
        kind = "chat.completion" if self.head.chat else "text_completion"
        return JSONResponse(api.envelope(self.head, kind, choices) | {"usage": self.usage().as_json()})

    def shaped(self, choice: int, found: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        """Of text completions with the place of each token in the answer, in characters."""
        if found is None:
            return None
        if self.head.chat:
            return {"content": found, "refusal": None}
        *starts, self.offset[choice] = itertools.accumulate(
            (len(one["token"]) for one in found), initial=self.offset[choice]
        )
        return {
            "tokens": [one["token"] for one in found],
            "token_logprobs": [one["logprob"] for one in found],
            "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in found],
            "text_offset": starts,
        }

    def filters(self, choice: int) -> dict[str, Any]:
        return filters.results(self.found[choice])

    def usage(self) -> Usage:
        cached = sum(one.found for one in self.sequences)
        return Usage(sum(self.prompt_tokens), sum(self.completion), cached)

    def close(self) -> None:
        self.front.router.open -= 1
        limits.give(self.spent, time.monotonic(), sum(self.prompt_tokens) + sum(self.completion))
        if self.request is not None and any(one.ended is None for one in self.sequences):
            routers.cancel(self.front.router, self.request)


def named(coder: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    piece = coder.piece(token)
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}
