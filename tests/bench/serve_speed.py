"""Decode and prefill tokens/s of an 80M-parameter Gemma 2 on CPU, ours beside transformers' `generate`, interleaved.

python -m tests.bench.serve_speed [--transformers PYTHON] [--rounds 3] [--dtype float32]

PYTHON is an interpreter that has torch and transformers. Each contender is a process of its own on two cores; prompts
of 512 random tokens, then 64 new ones, greedy; a decode step is the median of those after the first. Random weights:
what is computed does not depend on them. Bandwidth: what two threads read of memory (NumPy sums), in the same round.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

TOP = Path(__file__).parents[2]
BATCHES, PROMPT, NEW, PAGE = (1, 8, 32), 512, 64, 32
SIZES: dict[str, Any] = {
    "vocab": 32000,
    "width": 512,
    "layers": 16,
    "heads": 8,
    "kv_heads": 4,
    "head_size": 64,
    "hidden": 2048,
    "window": 256,
}


def ours(dtype: str) -> None:
    import jax
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from gemma.batching.plans import Admit, Chunk, Limits, Plan, Row, Sampling, Table
    from gemma.config import Model
    from gemma.engine import engine as engines
    from gemma.engine.forward import Shape
    from gemma.model.transformer import Gemma

    caps = {"attention_cap": 50.0, "final_cap": 30.0, "query_scale": 64**-0.5}
    model = Model(name="80m", context=1024, rope_base=1e4, norm_eps=1e-6, **SIZES, **caps)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("replica", "fsdp", "tensor"))
    here = NamedSharding(mesh, PartitionSpec())
    state = nnx.to_pure_dict(nnx.state(Gemma(model, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: jax.device_put(leaf.astype(dtype), here), state)
    pages = 1024 // PAGE
    tokens = np.random.default_rng(0).integers(4, model.vocab, PROMPT)
    for B in BATCHES:
        shapes = {"rows": (B,), "chunks": (256,), "scores": False}
        limits = Limits(B, 1024, PAGE, model.window, B * pages + 1, B * pages + 1, **shapes)
        with tempfile.TemporaryDirectory() as cache:
            engine = engines.open_engine(Shape(model, "float32", mesh), params, limits, Path(cache))
        tables = [tuple(range(1 + slot * pages, 1 + (slot + 1) * pages)) for slot in range(B)]
        for slot in range(B):
            engines.send_admit(engine, Admit(slot, Sampling(temperature=0), ()))

        def both(slot: int, position: int, tables: list[tuple[int, ...]] = tables) -> tuple[Table, Table]:
            first = max(0, position - model.window + 1) // PAGE
            return Table(first, tables[slot][first:]), Table(0, tables[slot])

        def done(plan: Plan, engine: engines.Engine = engine) -> float:
            started = time.perf_counter()
            engines.receive(engine, engines.send(engine, plan))
            return time.perf_counter() - started

        chunks = [
            Chunk(slot, start, tuple(tokens[start : start + 256].tolist()), both(slot, start), start + 256 == PROMPT)
            for slot in range(min(B, 2))
            for start in range(0, PROMPT, 256)
        ]
        prefill = statistics.median(done(Plan(1, (), (chunk,), (), 0)) for chunk in [*chunks, *chunks[1:]])
        steps = []
        for at in range(PROMPT, PROMPT + NEW, 8):
            rows = tuple(Row(slot, at, both(slot, at)) for slot in range(B))
            steps.append(done(Plan(1, (), (), rows, 8)) / 8)
        print(f"{B} {B / statistics.median(steps[1:])} {256 / prefill}", flush=True)


def transformers(dtype: str) -> None:
    import torch  # type: ignore[import-not-found]
    from transformers import Gemma2Config, Gemma2ForCausalLM  # type: ignore[import-not-found]

    torch.set_num_threads(2)
    torch.manual_seed(0)
    names = {
        "vocab": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "hidden": "intermediate_size",
    }
    names |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_size": "head_dim"}
    names |= {"window": "sliding_window"}
    sizes = {names[key]: value for key, value in SIZES.items()}
    config = Gemma2Config(**sizes, query_pre_attn_scalar=64, attn_implementation="eager", eos_token_id=None)
    model = Gemma2ForCausalLM(config).to(getattr(torch, dtype)).eval()

    class Clock:
        """Called by `generate` with each step's tokens."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    for B in BATCHES:
        ids = torch.randint(4, SIZES["vocab"], (B, PROMPT))
        clock = Clock()
        with torch.no_grad():
            started = time.perf_counter()
            model(ids[:1])
            prefill = time.perf_counter() - started
            from transformers import StoppingCriteria, StoppingCriteriaList  # type: ignore[import-not-found]

            class Each(StoppingCriteria):  # type: ignore[misc]
                def __call__(self, input_ids: Any, scores: Any, clock: Clock = clock, **_: Any) -> Any:
                    clock.put(None)
                    return torch.zeros(len(input_ids), dtype=torch.bool)

            criteria = StoppingCriteriaList([Each()])
            model.generate(ids, max_new_tokens=NEW, do_sample=False, stopping_criteria=criteria, pad_token_id=0)
        steps = np.diff(clock.times)[1:]
        print(f"{B} {B / statistics.median(steps)} {PROMPT / prefill}", flush=True)


def bandwidth() -> float:
    """Bytes/s that two threads read."""
    arrays = [np.ones(64 << 20, np.float32) for _ in range(2)]

    def once() -> float:
        threads = [threading.Thread(target=array.sum) for array in arrays]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(array.nbytes for array in arrays) / (time.perf_counter() - started)

    return statistics.median(once() for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--run")
    given = parser.parse_args()
    if given.run:
        (ours if given.run == "ours" else transformers)(given.dtype)
        return
    who = {"ours": sys.executable} | ({"transformers": given.transformers} if given.transformers else {})
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        limit = bandwidth()
        for name, python in who.items():
            command = [python, __file__, "--run", name, "--dtype", given.dtype]
            out = subprocess.run(
                command,
                cwd=TOP,
                env={"PYTHONPATH": str(TOP), "PATH": "", "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                timeout=1800,
            )
            if out.returncode:
                raise SystemExit(out.stderr[-2000:])
            for line in out.stdout.splitlines():
                B, decode, prefill = line.split()
                found.setdefault((name, int(B)), []).append((float(decode), float(prefill)))
                share = float(decode) * 317e6 / limit if B == "1" else 0.0
                said = f"; {share:.0%} of {limit / 1e9:.1f} GB/s" if share and given.dtype == "float32" else ""
                print(f"{name} batch {B}: {float(decode):.1f} tokens/s, prefill {float(prefill):.0f}{said}", flush=True)
    for (name, B), measured in found.items():
        decode, prefill = (statistics.median(column) for column in zip(*measured, strict=True))
        beside = statistics.median(d for d, _ in found["ours", B]) / decode
        print(f"median: {name} batch {B}: {decode:.1f} tokens/s, prefill {prefill:.0f}; ours {beside:.2f} x")


if __name__ == "__main__":
    main()
