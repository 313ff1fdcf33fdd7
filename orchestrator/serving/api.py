"""OpenAI's chat and text completions as data: requests that are checked to the last field, answers to the letter.

Source: platform.openai.com/docs/api-reference (chat, completions). A mistake in a request is a RequestError that names
the field, what came and what is allowed.
"""

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma.batching.plans import MOST_BIASES, MOST_LOGPROBS, Sampling

MOST_STOPS, MOST_CHOICES = 4, 128
# Known to OpenAI's clients and without a meaning here: they change no token.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Known, and not served: only where they say "nothing".
REFUSED = {"tools", "tool_choice", "functions", "function_call", "response_format", "audio", "modalities", "prediction"}
NOTHING: dict[str, Any] = {"tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}


class RequestError(Exception):
    """What is wrong with a request, in one line."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_s: float = 1.0,  # of 429 and 503: when it is worth trying again
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.retry_s = message, param, status, code, retry_s


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, chat or text."""

    model: str
    messages: tuple[dict[str, str], ...]  # of chat
    prompts: tuple[str | tuple[int, ...], ...]  # of text completions
    sampling: Sampling  # of the first choice; those after it have seeds that follow
    max_tokens: int | None
    choices: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int
    cached: int = 0

    def as_json(self) -> dict[str, Any]:
        cached = {"cached_tokens": self.cached, "audio_tokens": 0} if self.cached else None
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": cached,
            "completion_tokens_details": None,
        }


@dataclass(frozen=True)
class Head:
    """What all parts of an answer have in common."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool


def parse(body: bytes, chat: bool) -> Wanted:
    """Raises RequestError."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object")
    given = {str(key): value for key, value in found.items() if value is not None}
    refuse_unknown(given, chat)
    seed = integer(given, "seed", None, -(2**63), 2**63 - 1)
    stream = boolean(given, "stream")
    return Wanted(
        model=text(given, "model"),
        messages=messages(given) if chat else (),
        prompts=() if chat else prompts(given),
        sampling=sampling(given, chat, secrets.randbits(63) if seed is None else seed % 2**64),
        max_tokens=max_tokens(given, chat),
        choices=integer(given, "n", 1, 1, MOST_CHOICES) or 1,
        stops=stops(given),
        stream=stream,
        include_usage=include_usage(given, stream),
    )


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


BOTH = {
    *("model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "max_tokens"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs"),
}
KNOWN = {
    True: BOTH | {"messages", "max_completion_tokens", "top_logprobs"},
    False: BOTH | {"prompt", "echo", "suffix", "best_of"},
}


def refuse_unknown(given: Mapping[str, Any], chat: bool) -> None:
    for key, value in given.items():
        if key in REFUSED:
            if value not in (NOTHING.get(key), [], {}):
                raise RequestError(f"{key}: is not served here", key)
        elif key not in KNOWN[chat] | IGNORED:
            raise RequestError(f"{key[:100]}: unknown field; allowed are {', '.join(sorted(KNOWN[chat]))}", key[:100])
    if not chat:
        for key in ("suffix", "echo"):
            if given.get(key):
                raise RequestError(f"{key}: is not served here", key)
        if given.get("best_of", 1) not in (1, given.get("n", 1)):
            raise RequestError("best_of: is not served here; give n", "best_of")


def messages(given: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    found = given.get("messages")
    if not isinstance(found, list) or not found:
        raise RequestError("messages: must be a list with at least one message", "messages")
    return tuple(message(one, f"messages[{index}]") for index, one in enumerate(found))


def message(one: Any, where: str) -> dict[str, str]:
    if not isinstance(one, dict):
        raise RequestError(f"{where}: must be an object with role and content", where)
    role, content = one.get("role"), one.get("content")
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if role not in ("system", "user", "assistant", "model"):
        raise RequestError(f"{where}.role={shown(role)}: allowed are system, user, assistant", f"{where}.role")
    if isinstance(content, list):
        parts = []
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                at = f"{where}.content[{index}]"
                raise RequestError(f'{at}: must be {{"type": "text", "text": ...}}; Gemma 2 reads text alone', at)
            parts.append(part["text"])
        content = "".join(parts)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content={shown(content)}: must be text", f"{where}.content")
    return {"role": role, "content": checked_text(content, f"{where}.content")}


def checked_text(content: str, where: str) -> str:
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: half of a character (a lone surrogate) at {error.start}", where) from None
    return content


def prompts(given: Mapping[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    found = given.get("prompt")
    if isinstance(found, str):
        return (checked_text(found, "prompt"),)
    if isinstance(found, list) and found:
        if all(isinstance(one, str) for one in found):
            return tuple(checked_text(one, f"prompt[{index}]") for index, one in enumerate(found))
        if all(is_integer(one) for one in found):
            return (tuple(found),)
        if all(isinstance(one, list) and one and all(map(is_integer, one)) for one in found):
            return tuple(tuple(one) for one in found)
    raise RequestError("prompt: must be a text, texts, token ids or lists of them", "prompt")


def sampling(given: Mapping[str, Any], chat: bool, seed: int) -> Sampling:
    return Sampling(
        temperature=number(given, "temperature", 1.0, 0.0, 2.0),
        top_p=number(given, "top_p", 1.0, 0.0, 1.0),
        top_k=max(0, integer(given, "top_k", 0, -1, 2**31 - 1) or 0),  # -1 is all, as in vLLM
        min_p=number(given, "min_p", 0.0, 0.0, 1.0),
        seed=seed,
        frequency=number(given, "frequency_penalty", 0.0, -2.0, 2.0),
        presence=number(given, "presence_penalty", 0.0, -2.0, 2.0),
        repetition=number(given, "repetition_penalty", 1.0, 0.01, 100.0),
        bias=bias(given),
        logprobs=wanted_logprobs(given, chat),
    )


def wanted_logprobs(given: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return integer(given, "logprobs", None, 0, MOST_LOGPROBS)
    top = integer(given, "top_logprobs", None, 0, MOST_LOGPROBS)
    if not boolean(given, "logprobs"):
        if top is not None:
            raise RequestError("top_logprobs: goes with logprobs=true", "top_logprobs")
        return None
    return top or 0


def bias(given: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    found = given.get("logit_bias", {})
    if not isinstance(found, dict) or len(found) > MOST_BIASES:
        raise RequestError(f"logit_bias: must be an object of at most {MOST_BIASES} token ids", "logit_bias")
    biases = []
    for key, value in found.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise RequestError(f"logit_bias.{key[:40]}: must be a token id", "logit_bias")
        if not is_number(value) or not -100 <= value <= 100:
            raise RequestError(f"logit_bias.{key}={shown(value)}: must lie in -100..100", "logit_bias")
        biases.append((int(key), float(value)))
    return tuple(biases)


def stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    found = given.get("stop", [])
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or len(found) > MOST_STOPS or not all(isinstance(s, str) and s for s in found):
        raise RequestError(f"stop={shown(found)}: must be a text or at most {MOST_STOPS} texts, none empty", "stop")
    return tuple(checked_text(one, "stop") for one in found)


def max_tokens(given: Mapping[str, Any], chat: bool) -> int | None:
    newer = integer(given, "max_completion_tokens", None, 1, 2**31 - 1) if chat else None
    return newer or integer(given, "max_tokens", None if chat else 16, 1, 2**31 - 1)


def include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(f"stream_options={shown(options)}: must be an object", "stream_options")
    if options and not stream:
        raise RequestError("stream_options: goes with stream=true", "stream_options")
    return boolean(options, "include_usage", "stream_options.")


def text(given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not value:
        raise RequestError(
            f"{key}: missing; must be text" if value is None else f"{key}={shown(value)}: must be text", key
        )
    return value


def boolean(given: Mapping[str, Any], key: str, before: str = "") -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise RequestError(f"{before}{key}={shown(value)}: must be true or false", before + key)
    return value


def number(given: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = given.get(key, default)
    if not is_number(value) or not least <= value <= most:
        raise RequestError(f"{key}={shown(value)}: must lie in {least:g}..{most:g}", key)
    return float(value)


def integer(given: Mapping[str, Any], key: str, default: int | None, least: int, most: int) -> int | None:
    value = given.get(key, default)
    if value is None:
        return None
    if not is_integer(value) or not least <= value <= most:
        raise RequestError(f"{key}={shown(value)}: must be a whole number in {least}..{most}", key)
    return int(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def shown(value: Any) -> str:
    """A foreign value, cut to a part of one line."""
    try:
        whole = json.dumps(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return whole if len(whole) <= 80 else f"{whole[:80]}..."


def new_head(wanted: Wanted, fingerprint: str) -> Head:
    chat = bool(wanted.messages)
    prefix = "chat-" if chat else "cmpl-"
    return Head(f"{prefix}{secrets.token_hex(16)}", int(time.time()), wanted.model, fingerprint, chat)


def envelope(head: Head, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "choices": list(choices),
        "system_fingerprint": head.fingerprint,
    }


def whole_choice(
    head: Head, index: int, content: str, filters: dict[str, Any], reason: str, logprobs: Any
) -> dict[str, Any]:
    if not head.chat:
        return {"index": index, "text": content, "logprobs": logprobs, "finish_reason": reason}
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "finish_reason": reason,
        "logprobs": logprobs,
        "content_filter_results": filters,
    }


def part_choice(
    head: Head,
    index: int,
    delta: dict[str, Any],
    filters: dict[str, Any],
    reason: str | None = None,
    logprobs: Any = None,
) -> dict[str, Any]:
    """delta: of chat role or content; of text completions, content."""
    if not head.chat:
        found = delta.get("content", "")
        return {"index": index, "text": found, "logprobs": logprobs, "finish_reason": reason}
    return {
        "index": index,
        "delta": delta,
        "finish_reason": reason,
        "logprobs": logprobs,
        "content_filter_results": filters,
    }


def event(found: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {401: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
