"""Requests are checked to the last field: a mistake is one line that names the field, what came and what is allowed."""

import json
from typing import Any

import pytest

from orchestrator.serving import api
from orchestrator.serving.api import RequestError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def parsed(**changes: Any) -> api.Wanted:
    return api.parse(json.dumps(CHAT | changes).encode(), chat=True)


def test_the_page_s_own_request_is_read() -> None:
    found = parsed(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        max_tokens=512,
        stream=True,
    )
    assert (found.model, found.max_tokens, found.stream, found.choices) == ("m", 512, True, 1)
    assert [one["role"] for one in found.messages] == ["system", "user"]
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.logprobs) == (1.0, 1.0, None)


def test_what_is_not_given_is_openai_s_default_and_null_is_not_given() -> None:
    found = parsed(temperature=None, stop=None, logit_bias=None, tools=None, n=None)
    assert (found.sampling.temperature, found.stops, found.sampling.bias, found.choices) == (1.0, (), (), 1)
    assert parsed().sampling.seed != parsed().sampling.seed
    assert parsed(seed=5).sampling.seed == parsed(seed=5).sampling.seed == 5


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is not JSON"),
        (b"\xff{}", "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "m", "messages": []}', "messages: must be a list"),
    ],
)
def test_a_body_that_is_none_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        api.parse(body, chat=True)


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"model": 3}, "model", "^model=3: must be text"),
        ({"model": None}, "model", "missing"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": [3]}, "messages[0]", "must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "allowed are system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text alone"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "lone surrogate"),
        ({"temperature": -1}, "temperature", "must lie in 0..2"),
        ({"temperature": "hot"}, "temperature", "must lie in 0..2"),
        ({"temperature": True}, "temperature", "must lie in 0..2"),
        ({"temperature": 10**400}, "temperature", "must lie in 0..2"),
        ({"top_p": 1.5}, "top_p", "must lie in 0..1"),
        ({"n": 0}, "n", "must be a whole number in 1..128"),
        ({"n": 10**30}, "n", "must be a whole number"),
        ({"max_tokens": 0}, "max_tokens", "must be a whole number in 1.."),
        ({"max_tokens": 1.5}, "max_tokens", "must be a whole number"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "none empty"),
        ({"stop": 3}, "stop", "none empty"),
        ({"top_logprobs": 5}, "top_logprobs", "goes with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "in 0..20"),
        ({"logprobs": 3}, "logprobs", "must be true or false"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "must be a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "must lie in -100..100"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias", "at most 300"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream=true"),
        ({"tools": [{"type": "function"}]}, "tools", "is not served here"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not served here"),
        ({"frob": 1}, "frob", "unknown field; allowed are"),
        ({"prompt": "x"}, "prompt", "unknown field"),
        ({"seed": 2**70}, "seed", "must be a whole number"),
        ({"presence_penalty": 3}, "presence_penalty", "must lie in -2..2"),
    ],
)
def test_a_mistake_names_its_field(changes: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        parsed(**changes)
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 700


def test_text_completions_take_texts_and_token_ids() -> None:
    def of(prompt: Any) -> Any:
        return api.parse(json.dumps({"model": "m", "prompt": prompt}).encode(), chat=False).prompts

    assert of("a") == ("a",)
    assert of(["a", "b"]) == ("a", "b")
    assert of([4, 5]) == ((4, 5),)
    assert of([[4], [5, 6]]) == ((4,), (5, 6))
    for wrong in (None, 3, [], [[]], [True], ["a", 3]):
        with pytest.raises(RequestError, match="prompt: must be"):
            of(wrong)


@pytest.mark.parametrize("key", ["echo", "suffix"])
def test_what_text_completions_do_not_serve_is_refused_and_not_passed_over(key: str) -> None:
    with pytest.raises(RequestError, match=f"{key}: is not served here"):
        api.parse(json.dumps({"model": "m", "prompt": "a", key: True}).encode(), chat=False)
