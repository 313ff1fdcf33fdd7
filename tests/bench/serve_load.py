"""A server under load and under fire, over loopback: python -m tests.bench.serve_load ADDRESS [CLIENTS] [SECONDS] [RUN]

Streaming clients ask again as soon as they are answered. Printed: whole answers, errors, seconds to the first token and
between parts of a stream. RUN: a server's run directory; then its host process is killed at random, twenty times, and
each stream is held against the one that was not disturbed.
"""

import asyncio
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from orchestrator.record import rundir
from tests.runs import kill_worker

TOKENS, KILLS = 32, 20
PROMPTS = [f"def function_{n}(" for n in range(25)]


async def one(
    session: aiohttp.ClientSession, address: str, prompt: str, tokens: int, found: dict[str, list[float]]
) -> str:
    """The text of one stream."""
    body = {"model": "gemma-2", "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    asked, before, text = time.monotonic(), None, ""
    async with session.post(f"{address}/v1/chat/completions", json=body | {"stream": True, "seed": 7}) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {(await answer.text())[:200]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if not (content := event["choices"][0]["delta"].get("content")):
                continue
            now = time.monotonic()
            found["first" if before is None else "between"].append(now - (asked if before is None else before))
            before, text = now, text + content
    return text


def shown(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [float("nan")]
    return f"median {statistics.median(ordered):.3f} s, p99 {ordered[int(0.99 * (len(ordered) - 1))]:.3f} s"


async def load(address: str, clients: int, seconds: float) -> None:
    found: dict[str, list[float]] = {"first": [], "between": []}
    errors: list[str] = []
    whole = 0
    end = time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal whole
        while time.monotonic() < end:
            try:
                await one(session, address, PROMPTS[number % len(PROMPTS)], TOKENS, found)
                whole += 1
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(1)

    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await asyncio.gather(*(client(session, number) for number in range(clients)))
    print(f"{clients} clients, {seconds:.0f} s: {whole} whole answers, {len(errors)} errors {sorted(set(errors))[:3]}")
    print(f"first token: {shown(found['first'])}; between parts of a stream: {shown(found['between'])}")
    print(f"{whole * TOKENS / seconds:.0f} tokens/s")


async def fire(address: str, run: Path, clients: int) -> None:
    found: dict[str, list[float]] = {"first": [], "between": []}
    tokens, rng = 600, random.Random(0)
    timeout, connector = aiohttp.ClientTimeout(total=1200), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        calm = await asyncio.gather(*(one(session, address, prompt, tokens, found) for prompt in PROMPTS))
        pauses, streams, equal, killed = [], 0, 0, 0
        while killed < KILLS:
            found["between"].clear()
            asked: list[Any] = [
                asyncio.ensure_future(one(session, address, PROMPTS[n % len(PROMPTS)], tokens, found))
                for n in range(clients)
            ]
            while killed < KILLS and not all(task.done() for task in asked):
                await asyncio.sleep(rng.uniform(1.0, 5.0))
                if all(task.done() for task in asked):
                    break
                kill_worker(run, 0)
                killed += 1
                began = sum(event["event"] == "restore" for event in rundir.events(run))
                while sum(event["event"] == "restore" for event in rundir.events(run)) == began:
                    await asyncio.sleep(0.05)
            texts = await asyncio.gather(*asked)
            streams += len(texts)
            equal += sum(text == calm[n % len(PROMPTS)] for n, text in enumerate(texts))
            pauses += sorted(found["between"])[-clients:]
    print(f"{killed} kills under {clients} streams: {streams} streams, {equal} with the undisturbed run's text")
    failures = [event["time"] for event in rundir.events(run) if event["event"] == "failure"]
    ready = [event["time"] for event in rundir.events(run) if event["event"] == "restore"]
    stood = [min(r for r in ready if r > f) - f for f in failures]
    print(f"from a failure to standing again: median {statistics.median(stood):.2f} s, longest {max(stood):.2f} s")


def main(address: str, clients: str = "1000", seconds: str = "120", run: str = "") -> None:
    print(f"{os.cpu_count()} cores")
    if run:
        asyncio.run(fire(address, Path(run), int(clients)))
    else:
        asyncio.run(load(address, int(clients), float(seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
