"""HTTP: OpenAI's routes over the router, by FastAPI on uvicorn, in a thread of the controller's process."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from gemma.batching import schedule
from gemma.config import ConfigError, Serve
from gemma.text import chat as chats
from gemma.text import tokenizer as tokenizers
from gemma.text.tokenizer import BOS, EOS, Tokenizer
from gemma.versions import source_digest
from orchestrator.config import Config
from orchestrator.serving import api, limits, metrics
from orchestrator.serving import router as routers
from orchestrator.serving.api import RequestError, Wanted
from orchestrator.serving.limits import Spent
from orchestrator.serving.live import Front, Live, problem
from orchestrator.serving.router import SERVED, Router

STARTS_S = 10.0
BODY_S = 30.0  # for a request's body to be there


@contextmanager
def served(config: Config, router: Router) -> Iterator[str]:
    """HTTP is answered; gives its address. Raises ConfigError where the port or the keys cannot be had."""
    serve = config.serve
    assert serve is not None
    facts = json.dumps([serve.checkpoint, serve.weights, vars(config.model), source_digest()], sort_keys=True)
    coder = tokenizers.load(config.data.tokenizer)
    front = Front(config, serve, router, coder, keys_of(serve.api_keys), facts, time.time())
    listener = listening(serve)
    settings = uvicorn.Config(
        app(front), log_config=None, access_log=False, timeout_keep_alive=30, h11_max_incomplete_event_size=1 << 16
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
    thread.start()
    deadline = time.monotonic() + STARTS_S
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise ConfigError(f"serve.port={serve.port}: the HTTP server has not started within {STARTS_S:.0f} s")
        time.sleep(0.01)
    host, port = listener.getsockname()[:2]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        thread.join(5.0)
        server.force_exit = True
        thread.join(5.0)
        listener.close()


def listening(serve: Serve) -> socket.socket:
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    try:
        return socket.create_server((serve.host, serve.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"serve.host={serve.host} serve.port={serve.port}: {error.strerror}") from error


def keys_of(path: str | None) -> frozenset[bytes]:
    """Digests of the keys in a file, a key a line. Raises ConfigError."""
    if path is None:
        return frozenset()
    try:
        lines = Path(path).expanduser().read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serve.api_keys={path}: cannot be read ({error})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"serve.api_keys={path}: holds no key; give a key a line")
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


def app(front: Front) -> FastAPI:
    made = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    if front.serve.cors:
        made.add_middleware(
            CORSMiddleware, allow_origins=list(front.serve.cors), allow_methods=["*"], allow_headers=["*"]
        )

    def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return problem(error.message, error.status, error.param, error.code, error.retry_s)

    def missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem(f"{request.method} {request.url.path[:100]}: {error.detail}", error.status_code)

    made.add_exception_handler(RequestError, refused)
    made.add_exception_handler(HTTPException, missing)
    prefixes = dict.fromkeys(("/v1", front.serve.prefix))
    for prefix in prefixes:
        for path, is_chat in (("/chat/completions", True), ("/completions", False)):
            made.add_api_route(prefix + path, completing(front, is_chat), methods=["POST"], response_model=None)
        made.add_api_route(f"{prefix}/models", models(front), methods=["GET"])
    made.add_api_route("/health", health(front), methods=["GET"])
    made.add_api_route("/metrics", shown_metrics(front), methods=["GET"])
    made.add_api_route("/", page, methods=["GET"])
    return made


def page() -> HTMLResponse:
    return HTMLResponse((Path(__file__).parent / "chat.html").read_text())


def health(front: Front) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        ok = front.router.stands
        return JSONResponse({"status": "ok" if ok else "no replica stands"}, 200 if ok else 503)

    return answer


def models(front: Front) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        check_key(front, request)
        shapes = front.router.limits[SERVED] if front.router.limits else None
        one = {"id": front.serve.name, "object": "model", "created": int(front.started), "owned_by": "google"}
        one |= {"max_model_len": shapes.context if shapes else None, "content_filter": front.serve.filter}
        return JSONResponse({"object": "list", "data": [one]})

    return answer


def shown_metrics(front: Front) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(metrics.text(front.router.metrics), media_type="text/plain; version=0.0.4")

    return answer


def check_key(front: Front, request: Request) -> bytes:
    """The key's digest, nothing where none is asked for. All are compared, in constant time. Raises RequestError."""
    if not front.keys:
        return b""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
    right = [hmac.compare_digest(digest, one) for one in front.keys]
    if kind.lower() != "bearer" or not any(right):
        raise RequestError("no such API key; give it as Authorization: Bearer KEY", None, 401, "invalid_api_key")
    return digest


def check_spent(front: Front, key: bytes) -> Spent:
    """What a key has asked for in the last minute, this request with it. Raises RequestError where it is too much."""
    spent, now = front.spent.setdefault(key, Spent()), time.monotonic()
    requests, tokens = front.serve.requests_per_minute, front.serve.tokens_per_minute
    if (wait := limits.wait_s(spent, now, requests, tokens)) > 0:
        of = f"serve.requests_per_minute={requests} serve.tokens_per_minute={tokens}"
        raise RequestError(f"too much for one key ({of}); try again in {math.ceil(wait)} s", None, 429, None, wait)
    limits.ask(spent, now)
    return spent


async def read_body(front: Front, request: Request) -> bytes:
    """Raises RequestError for one that is too large, or too slow."""
    most, parts, size = int(front.serve.body_mb * 1e6), [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise RequestError(f"the body has more than {most:,} bytes (serve.body_mb)", None, 413)
                parts.append(part)
    except TimeoutError:
        raise RequestError(f"the body was not there within {BODY_S:.0f} s", None, 408) from None
    return b"".join(parts)


def completing(front: Front, chat: bool) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        key = check_key(front, request)
        wanted = api.parse(await read_body(front, request), chat)
        if wanted.model != front.serve.name:
            said = f"model={api.shown(wanted.model)}: is not served here; allowed is {front.serve.name}"
            raise RequestError(said, "model", 404, "model_not_found")
        router = front.router
        if not router.stands or not router.limits:
            raise RequestError("no replica stands; try again", None, 503)
        if router.open >= router.queue:
            raise RequestError(f"{router.open} requests run or wait (serve.queue); try again", None, 429)
        prompts = encoded(front, wanted, chat)
        sequences = [one for prompt in prompts for one in made_sequences(front, wanted, prompt, chat)]
        spent = check_spent(front, key)
        router.open += 1
        live = Live(front, wanted, sequences, question(wanted, front.coder), [len(p) for p in prompts], spent)
        if wanted.stream:
            return StreamingResponse(live.events(), media_type="text/event-stream", headers=NO_BUFFER)
        return await whole_or_gone(live, request)

    return answer


NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def encoded(front: Front, wanted: Wanted, chat: bool) -> list[tuple[int, ...]]:
    """Raises RequestError."""
    if chat:
        try:
            return [tuple(int(i) for i in chats.tokens(wanted.messages, front.coder, prompt=True))]
        except ConfigError as error:
            raise RequestError(str(error), "messages") from None
    found: list[tuple[int, ...]] = []
    for prompt in wanted.prompts:
        if isinstance(prompt, str):
            found.append((BOS, *(int(i) for i in front.coder.encode([prompt])[0])))
            continue
        if any(not 0 <= token < front.config.model.vocab for token in prompt):
            raise RequestError(f"prompt: token ids must lie in 0..{front.config.model.vocab - 1}", "prompt")
        found.append(prompt)
    return found


def question(wanted: Wanted, coder: Tokenizer) -> str:
    """What a filter judges of a request: all that the user wrote."""
    written = [one["content"] for one in wanted.messages if one["role"] in ("user", "system")]
    given = [
        p if isinstance(p, str) else b"".join(map(coder.piece, p)).decode("utf-8", "replace") for p in wanted.prompts
    ]
    return "\n\n".join([*written, *given])


def made_sequences(front: Front, wanted: Wanted, prompt: tuple[int, ...], chat: bool) -> list[schedule.Sequence]:
    """Raises RequestError where they do not fit."""
    router, shapes = front.router, front.router.limits[SERVED]
    for token, _ in wanted.sampling.bias:
        if token >= front.config.model.vocab:
            raise RequestError(f"logit_bias.{token}: token ids are below {front.config.model.vocab}", "logit_bias")
    if len(prompt) >= shapes.context:
        said = f"{len(prompt)} tokens; the context is {shapes.context}, and at least one token is to be chosen"
        raise RequestError(f"{'messages' if chat else 'prompt'}: {said}", None, 400, "context_length_exceeded")
    most = wanted.max_tokens or shapes.context - len(prompt)
    ends = {EOS, chats.turn_ids(front.coder)[1]} if chat else {EOS}
    made = routers.new_sequences(router, prompt, wanted.choices, wanted.sampling, most, ends)
    if why := schedule.refusal(shapes, made[0]):
        raise RequestError(f"messages: {why}" if chat else f"prompt: {why}", None, 400, "context_length_exceeded")
    return made


async def whole_or_gone(live: Live, request: Request) -> Response:
    """The whole answer; cancelled once the client has gone away."""
    answer = asyncio.ensure_future(live.whole())
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        return Response(status_code=499)
    finally:
        for task in (answer, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
