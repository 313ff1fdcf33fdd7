"""What HTTP, router and controller cost: an 80M Gemma 2 asked through launch.serve, and its engine bare, in turn.

python -m tests.bench.serve_http [ROUNDS]

Bare: the same plans on the same engine in one process, without Ray and HTTP. Told: seconds to the first token of a
lone request after a prompt of 56 tokens, and tokens/s of 32 sequences of 96 tokens each. Random weights.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from gemma.batching import schedule
from gemma.batching.plans import Limits, Sampling
from gemma.config import Model
from orchestrator.record import rundir
from tests import hf_cases
from tests.bench.serve_speed import SIZES
from tests.runs import launch, wait_for

MODEL = Model(
    name="80m", context=1024, rope_base=1e4, norm_eps=1e-6, attention_cap=50.0, final_cap=30.0, query_scale=64**-0.5,
    **SIZES,
)  # fmt: skip
CONTENT, NEW, STREAMS, LONE = "x" * 40, 96, 32, 25  # with its turn's tokens a prompt of 56


def bare(folder: Path) -> tuple[float, float]:
    """Seconds to the first token, tokens/s."""
    out = subprocess.run(
        [sys.executable, __file__, "bare", str(folder)], capture_output=True, text=True, timeout=900, check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", "JAX_PLATFORMS": "cpu"},
    ).stdout  # fmt: skip
    first, speed = map(float, out.split())
    return first, speed


def run_bare(folder: Path) -> None:
    import jax

    from gemma.engine import engine as engines
    from gemma.engine import server
    from gemma.engine.forward import Shape
    from gemma.model.load import load_params

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("replica", "fsdp", "tensor"))
    params = load_params(str(folder), server.abstract_params(MODEL, mesh, "float32"))
    limits = Limits(STREAMS, 1024, 32, MODEL.window, 1025, 1025, rows=(1, 8, 32), chunks=(16, 64, 256), scores=False)
    engine = engines.open_engine(Shape(MODEL, "float32", mesh), params, limits, Path(tempfile.mkdtemp()))

    def go(count: int, new: int) -> float:
        batch, flight = schedule.open_batch(limits), deque[Any]()
        for n in range(count):
            prompt = tuple(range(100 * n + 4, 100 * n + 60))
            schedule.submit(batch, schedule.Sequence(n, prompt, Sampling(temperature=0), new, frozenset()))
        started = time.perf_counter()
        while not schedule.idle(batch) or flight:
            plan = schedule.plan(batch, 1, 256)
            if not plan.empty:
                flight.append(engines.send(engine, plan))
            if len(flight) >= 2 or plan.empty:
                schedule.take_answer(batch, engines.receive(engine, flight.popleft()))
        return time.perf_counter() - started

    go(2, 4)
    first = statistics.median(go(1, 1) for _ in range(LONE))
    print(first, STREAMS * NEW / go(STREAMS, NEW))


async def asked(address: str) -> tuple[float, float]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one(number: int, new: int) -> float:
            """Seconds to the first token."""
            content = f"{number:02d}{time.monotonic_ns() % 10**6:06d}" + CONTENT[8:]  # no beginning is found again
            body = {"model": "gemma-2", "messages": [{"role": "user", "content": content}], "max_tokens": new}
            started, first = time.perf_counter(), 0.0
            more = {"stream": True, "temperature": 0, "logit_bias": {"1": -100, "261": -100}}  # nothing ends it early
            async with session.post(f"{address}/v1/chat/completions", json=body | more) as answer:
                async for line in answer.content:
                    if (
                        not first
                        and line.startswith(b"data: {")
                        and json.loads(line[6:])["choices"][0]["finish_reason"]
                    ):
                        first = time.perf_counter() - started
                    if not first and b'"content":"' in line:
                        first = time.perf_counter() - started
            return first

        await one(0, 4)
        first = statistics.median([await one(n, 1) for n in range(LONE)])
        started = time.perf_counter()
        await asyncio.gather(*(one(n, NEW) for n in range(STREAMS)))
        return first, STREAMS * NEW / (time.perf_counter() - started)


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        folder = hf_cases.write_folder(root / "hf", MODEL)
        sizes = {key: value for key, value in vars(MODEL).items() if key not in ("name",)}
        overrides = [f"model.{key}={value}" for key, value in sizes.items()]
        more = ["serve.slots=32", "serve.port=0", "wandb.mode=disabled", f"run.root={root / 'runs'}", "run.id=http"]
        process = launch("serve", f"weights={folder}", *overrides, *more)
        try:
            events = lambda name: [e for e in rundir.events(root / "runs" / "http") if e["event"] == name]  # noqa: E731
            wait_for(lambda: events("restore"), "a replica", process)
            address = events("listen")[0]["address"]
            found: dict[str, list[tuple[float, float]]] = {"bare": [], "http": []}
            for _ in range(rounds):
                found["bare"].append(bare(folder))
                found["http"].append(asyncio.run(asked(address)))
                print({name: pairs[-1] for name, pairs in found.items()}, flush=True)
        finally:
            process.terminate()
            process.communicate(timeout=100)
    first, speed = ({n: statistics.median(p[i] for p in pairs) for n, pairs in found.items()} for i in (0, 1))
    print(f"first token: bare {first['bare'] * 1e3:.1f} ms, through HTTP {first['http'] * 1e3:.1f} ms")
    print(f"32 streams: bare {speed['bare']:.1f} tokens/s, through HTTP {speed['http']:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        run_bare(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
