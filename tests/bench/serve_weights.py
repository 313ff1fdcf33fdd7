"""What serve.weights costs in accuracy: python -m tests.bench.serve_weights RUN [FILES]

The log-probability that a run's newest checkpoint gives to Python's own library, 512 bytes of each of FILES files, with
its weights held as float32, bfloat16 and int8 (computed in float32).
"""

import itertools
import json
import math
import sys
import sysconfig
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma.batching import schedule
from gemma.batching.plans import Limits, Sampling
from gemma.config import Model
from gemma.engine import engine as engines
from gemma.engine import server
from gemma.engine.forward import Shape
from gemma.model.load import load_params
from gemma.text.tokenizer import BOS, ByteTokenizer

BYTES = 512


def scored(folder: Path, model: Model, weights: str, texts: list[list[int]]) -> np.ndarray:
    """Of each text's bytes, the log-probability."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("replica", "fsdp", "tensor"))
    stored = "float32" if weights == "int8" else weights
    params = load_params(str(folder), server.abstract_params(model, mesh, stored))
    limits = Limits(8, 1024, 32, model.window, 257, 257, rows=(8,), chunks=(256,))
    shape = Shape(model, "float32", mesh, weights == "int8")
    engine = engines.open_engine(shape, params, limits, Path(tempfile.mkdtemp()))
    batch, flight, found = schedule.open_batch(limits), deque[Any](), [list[float]() for _ in texts]
    for n, text in enumerate(texts):
        schedule.submit(batch, schedule.Sequence(n, tuple(text), Sampling(), 0, frozenset(), score_from=1))
    while not schedule.idle(batch) or flight:
        plan = schedule.plan(batch, 1, 256)
        if not plan.empty:
            flight.append(engines.send(engine, plan))
        if len(flight) >= 2 or plan.empty:
            for item in schedule.take_answer(batch, engines.receive(engine, flight.popleft())):
                found[item.sequence.id] += item.scored.logprobs if item.scored else ()
    return np.concatenate([np.array(one) for one in found])


def main(run: str, files: str = "40") -> None:
    folder = Path(run)
    manifest = json.loads((folder / "manifest.json").read_text())
    model = Model(**manifest["config"]["model"])
    paths = itertools.islice(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), 0, 3 * int(files), 3)
    texts = [[BOS, *map(int, ByteTokenizer().encode([path.read_text()[:BYTES]])[0])] for path in paths]
    whole = scored(folder, model, "float32", texts)
    print(f"float32: {-whole.mean() / math.log(2):.4f} bits a byte, {len(whole)} bytes")
    for weights in ("bfloat16", "int8"):
        other = scored(folder, model, weights, texts)
        more, moved = (whole - other).mean() / math.log(2), np.abs(other - whole).mean()
        print(f"{weights}: {more:+.5f} bits a byte; a byte's log-probability moves by {moved:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
