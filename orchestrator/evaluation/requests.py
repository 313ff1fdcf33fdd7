"""What a suite asks of a model, as tokens: scores of given continuations, and texts that are to be written.

Rendered by lm-eval's task definitions, tokenised here: one BOS a request, always. Everything is known before a host is
asked for, and is the same each time: an evaluation that goes on asks for what is not answered yet.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemma.batching.plans import Sampling
from gemma.batching.rows import Plan, Request, make_plan
from gemma.config import ConfigError
from gemma.text import chat as chats
from gemma.text.tokenizer import BOS, EOS, Tokenizer

MOST_TOKENS = 256  # of a text whose task names no limit
CHAT = "\0chat"  # before a conversation that is handed through lm-eval as JSON


@dataclass(frozen=True)
class Text:
    """A prompt, and where its answer ends."""

    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    ends: frozenset[int]
    max_tokens: int
    sampling: Sampling


@dataclass(frozen=True)
class Asked:
    """All requests of a suite, in the order in which parts, documents and choices come."""

    plan: Plan  # of the scores
    texts: tuple[Text, ...]
    crossed: int  # continuations whose first token began in the context
    tokens: int  # as if each request were computed by itself
    digest: str


@dataclass
class Rendered:
    """lm-eval's instances of one part, each with the number of the request that answers it."""

    row: str
    part: str
    task: Any
    scores: list[tuple[Any, int]] = field(default_factory=list)
    texts: list[tuple[Any, int]] = field(default_factory=list)


class TooLongError(Exception):
    """A request has more tokens than the model's context. Nothing is cut."""


def ask(
    parts: Sequence[tuple[str, str, Any]], coder: Tokenizer, context: int, block_tokens: int
) -> tuple[Asked, list[Rendered], dict[str, str]]:
    """parts: row, part and lm-eval's task with its instances built. context: of the model. Gives as well which rows are
    not asked, as they do not fit, and why.
    """
    rendered, texts, tasks, absent = list[Rendered](), list[Text](), list[list[list[Request]]](), dict[str, str]()
    count, crossed, total = 0, 0, 0
    for row, members in itertools.groupby(parts, key=lambda part: part[0]):
        try:
            encoded = [(part, task, encode_task(row, part, task, coder, context)) for _, part, task in members]
        except TooLongError as error:
            absent[row] = str(error)
            continue
        for part, task, (scored, written) in encoded:
            one = Rendered(row, part, task)
            documents: dict[int, list[Request]] = {}
            for instance, request, over in scored:
                documents.setdefault(instance.doc_id, []).append(request)
                one.scores.append((instance, count))
                count, crossed, total = count + 1, crossed + over, total + len(request.tokens)
            tasks.append(list(documents.values()))
            for instance, text in written:
                one.texts.append((instance, len(texts)))
                texts.append(text)
                total += len(text.tokens)
            rendered.append(one)
    plan = make_plan(tasks, block_tokens)
    made = hashlib.sha256(plan.digest().encode())
    for text in texts:
        made.update(repr((text.tokens, text.stops, sorted(text.ends), text.max_tokens, text.sampling)).encode())
    return Asked(plan, tuple(texts), crossed, total, made.hexdigest()[:32]), rendered, absent


Scored = list[tuple[Any, Request, bool]]  # an instance, its request, and whether a token spans its border
Written = list[tuple[Any, Text]]


def encode_task(row: str, part: str, task: Any, coder: Tokenizer, context: int) -> tuple[Scored, Written]:
    """Raises TooLongError, and ConfigError for what cannot be asked here."""

    def check(instance: Any, tokens: int) -> None:
        if tokens > context:
            where = f"document {instance.doc_id}" + (f" of {part}" if part != row else "")
            raise TooLongError(f"{where} has {tokens} tokens; the model's context is {context}, and nothing is cut")

    kinds = {instance.request_type for instance in task.instances} - {"loglikelihood", "generate_until"}
    if kinds:
        raise ConfigError(f"evaluate.tasks: {row} asks for {', '.join(sorted(kinds))}, which is not answered here")
    scores = [instance for instance in task.instances if instance.request_type == "loglikelihood"]
    scored: Scored = []
    for instance, (request, over) in zip(
        scores, encode_pairs([instance.args for instance in scores], coder), strict=True
    ):
        check(instance, len(request.tokens))
        scored.append((instance, request, over))
    written: Written = []
    for instance in task.instances:
        if instance.request_type == "generate_until":
            text = encode_text(instance.args, coder)
            check(instance, len(text.tokens) + 1)
            written.append((instance, replace(text, max_tokens=min(text.max_tokens, context - len(text.tokens)))))
    return scored, written


def encode_pairs(pairs: Sequence[tuple[str, str]], coder: Tokenizer) -> list[tuple[Request, bool]]:
    """Contexts and continuations, tokenised as one text, as lm-eval does it: white space at the end of a context goes
    to the continuation, whose tokens are those after as many as the context has by itself. And whether the first of
    them began in the context.
    """
    split = []
    for context, continuation in pairs:
        kept = context if context.startswith(CHAT) else context.rstrip()
        split.append((kept, context[len(kept) :] + continuation))
    contexts = encode_contexts({context for context, _ in split}, coder)
    wholes = iter(coder.encode([context + rest for context, rest in split if not context.startswith(CHAT)]))
    behind = iter(coder.encode([rest for context, rest in split if context.startswith(CHAT)]))
    found: list[tuple[Request, bool]] = []
    for context, _ in split:
        before = contexts[context]
        if context.startswith(CHAT):  # nothing is merged over a control token
            tokens = (*before, *(int(i) for i in next(behind)))
        else:
            tokens = (BOS, *(int(i) for i in next(wholes)))
        cut = min(len(before), len(tokens) - 1)  # a continuation that lies within the context's last token: that one
        found.append((Request(tokens, cut), tokens[: len(before)] != before))
    return found


def encode_contexts(contexts: Iterable[str], coder: Tokenizer) -> dict[str, tuple[int, ...]]:
    """With BOS."""
    known = sorted(set(contexts))
    found = {context: conversation(context, coder) for context in known if context.startswith(CHAT)}
    plain = [context for context in known if not context.startswith(CHAT)]
    for context, ids in zip(plain, coder.encode(plain), strict=True):
        found[context] = (BOS, *(int(i) for i in ids))
    return found


def conversation(context: str, coder: Tokenizer) -> tuple[int, ...]:
    messages = json.loads(context.removeprefix(CHAT))
    return tuple(int(i) for i in chats.tokens(messages, coder, prompt=True))


def as_chat(messages: Sequence[dict[str, str]], **_: Any) -> str:
    """What lm-eval takes for a chat template."""
    return CHAT + json.dumps(list(messages))


def encode_text(args: tuple[str, dict[str, Any]], coder: Tokenizer) -> Text:
    prompt, wanted = args
    stops = wanted.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    sampled = bool(wanted.get("do_sample")) and float(wanted.get("temperature", 0)) > 0
    temperature, top_p = (float(wanted.get("temperature", 0)), float(wanted.get("top_p", 1))) if sampled else (0.0, 1.0)
    ends = {EOS, chats.turn_ids(coder)[1]} if prompt.startswith(CHAT) else {EOS}
    (tokens,) = encode_contexts([prompt], coder).values()
    most = int(wanted.get("max_gen_toks") or MOST_TOKENS)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    return Text(tokens, tuple(stop for stop in stops if stop), frozenset(ends), most, sampling)
