"""Asks the TPU compiler, in a process of its own, what a step needs; remembers the answer."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemma.config import ConfigError, naming
from gemma.plan.compile_ahead import Job
from gemma.versions import packages, source_digest
from orchestrator.config import Config
from orchestrator.slices.environment import inherited

POLL_S = 0.2
Tell = Callable[[str, float], None]  # what is being compiled, and for how many seconds


@dataclass(frozen=True)
class Answer:
    facts: dict[str, Any]  # `gemma.plan.compile_ahead.Facts`; of a server `gemma.plan.serving_ahead.ServingFacts`
    cached: bool


class CompilerError(RuntimeError):
    """The compiler failed, for another reason than memory. The text names the file that has its story."""


def facts_of(config: Config, tell: Tell) -> Answer:
    """Compiles config's programs for its slices, or remembers. Minutes, or an instant.

    Raises ConfigError where there is no compiler, CompilerError where it fails or is not done in timeout.compile_s.
    """
    folder = Path(config.run.cache).expanduser() / "plans"
    path = folder / f"{key(config)}.json"
    if path.exists():
        try:
            return Answer(json.loads(path.read_text()), cached=True)
        except ValueError:  # torn: compiled again
            path.unlink()
    if find_spec("libtpu") is None:
        raise ConfigError("libtpu: the TPU compiler is not installed; make install does it, or give plan.skip=true")
    with naming(f"run.cache={config.run.cache}"):
        folder.mkdir(parents=True, exist_ok=True)
    text = compiled(config, path.with_suffix(".log"), tell)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(text)
    partial.rename(path)
    return Answer(json.loads(text), cached=False)


def key(config: Config) -> str:
    """Names an answer by all that it depends on: what the step is built from, and versions."""
    p = config.program
    train = (p.train.batch, p.train.dtype, p.train.accumulation, p.train.remat, p.train.loss_chunk)
    reduced = p.train.gradients_in
    step: tuple[Any, ...] = (p.model, p.mesh)
    if p.serve is not None:
        shapes = (p.serve.slots, p.serve.context, p.serve.page, p.serve.chunk, p.serve.cache_tokens, p.serve.weights)
        step += (*shapes,)
    else:
        step += (p.data.sequence, train, reduced, p.optim.schedule, p.optim.clip_norm is None)
    where = (config.slice.topology, config.cluster.num_slices)
    versions = packages("jax", "jaxlib", "libtpu", "flax", "optax")
    return hashlib.sha256(repr((step, where, versions, source_digest())).encode()).hexdigest()[:24]


def compiled(config: Config, log: Path, tell: Tell) -> str:
    """The facts as JSON. What the compiler says goes to `log`, which stays only where it fails."""
    job = pickle.dumps(Job(config.program, config.slice.topology, config.cluster.num_slices))
    command = [sys.executable, "-m", "gemma.plan.compile_ahead"]
    started = time.monotonic()
    with (
        log.open("wb") as said,
        log.with_suffix(".out").open("w+b") as out,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=said,
            cwd=Path(__file__).parents[2],
            env=inherited(os.environ),
        ) as process,
    ):
        try:
            assert process.stdin
            process.stdin.write(job)
            process.stdin.close()
            while process.poll() is None:
                elapsed_s = time.monotonic() - started
                if elapsed_s > config.timeout.compile_s:
                    raise CompilerError(f"not done after timeout.compile_s={config.timeout.compile_s}; see {log}")
                tell(name(config), elapsed_s)
                time.sleep(POLL_S)
        finally:
            process.kill()
            log.with_suffix(".out").unlink()  # it stays open here
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise CompilerError(f"the compiler ended with {process.returncode}; its story is in {log}")
    log.unlink()
    return text


def name(config: Config) -> str:
    mesh, train = config.program.mesh, config.program.train
    shape = f"{mesh.replica} x {mesh.fsdp} x {mesh.tensor}"
    if config.serve is not None:
        return f"a server of {config.model.name} on {config.cluster.slice}, mesh {shape}, {config.serve.slots} slots"
    return f"{config.model.name} on {config.cluster.slice}, mesh {shape}, batch {train.batch}, remat {train.remat}"
