"""A run's programs, compiled for TPUs that are not here, and what the compiler says of them.

python -m gemma.plan.compile_ahead < JOB > FACTS: a process of its own, for libtpu speaks to standard error and may end
the process. JOB is a pickled `Job`, FACTS the JSON of `Facts`.
"""

import ctypes
import json
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma.config import Program
from gemma.plan import hlo, serving_ahead, v5p
from gemma.plan.hlo_cost import Cost, Place, cost

if TYPE_CHECKING:  # JAX comes in when this is a process of its own
    from jax.sharding import Mesh

    from gemma.train.step import Functions

PR_SET_PDEATHSIG = 1  # prctl, Linux
QUIET = {  # libtpu looks for a machine's TPUs and its metadata server unless told
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock: nothing of a TPU is touched
}


@dataclass(frozen=True)
class Job:
    program: Program  # its mesh filled
    topology: str  # of one slice, as in 8x8x8
    num_slices: int


@dataclass(frozen=True)
class Facts:
    """Of one chip. Where the train step does not fit, only `needed_bytes` and the state's share are known.

    parameters_bytes, optimizer_bytes: what the shardings say. gradients_bytes: what the backward loop stacks, else the
    parameters' share. activations_bytes: what the forward loop stacks for the backward one. temporary_bytes: all that
    the compiler sets aside beside arguments. needed_bytes: arguments, temporaries and code.
    optimal_s: `cost_analysis()["optimal_seconds"]`, which counts a loop's body once and a kernel not at all.
    programs_bytes: of every other program of a run what a chip must hold while it runs: its arguments, temporaries,
    results and code, and the part of the state that lies beside them. Unknown where the train step does not fit.
    compile_s: of the train step; others_compile_s: of the others.
    """

    fits: bool  # every program by itself
    message: str
    parameters_bytes: int
    optimizer_bytes: int
    needed_bytes: int
    temporary_bytes: int = 0
    gradients_bytes: int = 0
    activations_bytes: int = 0
    optimal_s: float = 0.0
    cost: Cost | None = None
    compile_s: float = 0.0
    programs_bytes: dict[str, int] = field(default_factory=dict)
    others_compile_s: float = 0.0


def facts(job: Job) -> Facts:
    """Compiles. Takes a minute or two for 27B, whatever the number of chips."""
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    from gemma.model.sharding import make_mesh
    from gemma.train.step import functions

    slices = {"num_slices": job.num_slices} if job.num_slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"v5p:{job.topology}", **slices)
    mesh = make_mesh(job.program.mesh, described.devices)
    step = functions(job.program, mesh)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plan-") as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            compiled = step.train.lower(step.state, step.batch).compile(compiler_options=options)
        except JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            message = str(error).splitlines()[0]
            parameters, optimizer = held(step.state.params), held(step.state.opt_state)
            return Facts(False, message, parameters, optimizer, max(needed, parameters + optimizer))
        compile_s = time.monotonic() - started
        (text,) = Path(dump).glob("*jit_update*after_codegen.txt")
        module = hlo.parse(text.read_text())
    memory = compiled.memory_analysis()
    activations, gradients = stacked(module, job.program.model.layers // 2)
    parameters = held(step.state.params)
    started = time.monotonic()
    others, refused = other_programs(step, mesh)
    places = [Place(getattr(d, "slice_index", 0) or 0, tuple(d.coords)) for d in mesh.devices.flat]
    return Facts(
        fits=not refused,
        message=refused,
        parameters_bytes=parameters,
        optimizer_bytes=held(step.state.opt_state),
        needed_bytes=needed_bytes(memory),
        temporary_bytes=memory.temp_size_in_bytes,
        activations_bytes=min(activations, memory.temp_size_in_bytes),
        gradients_bytes=min(gradients or parameters, memory.temp_size_in_bytes),
        optimal_s=compiled.cost_analysis()["optimal_seconds"],
        cost=cost(module, dict(mesh.shape), places),
        compile_s=compile_s,
        programs_bytes=others,
        others_compile_s=time.monotonic() - started,
    )


def other_programs(step: "Functions", mesh: "Mesh") -> tuple[dict[str, int], str]:
    """`Facts.programs_bytes`, and why one of them does not fit, or nothing. Raises for other errors."""
    from jax.errors import JaxRuntimeError

    from gemma.checkpoint import checksums, saving, snapshot

    state = (step.state,)
    pack, unpack = snapshot.packing(step.state, mesh)
    programs: dict[str, tuple[Any, tuple[Any, ...], int]] = {  # what is compiled, of what, and what lies beside it
        "eval": (step.eval, (step.state.params, step.batch), held(step.state.opt_state)),
        "init": (step.init, (), 0),
        "pack": (pack, state, 0),
        "unpack": (unpack, (snapshot.flat_shape(step.state, mesh),), 0),
        "sums": (checksums.summing(step.state, mesh), state, 0),
    }
    if snapshot.fits_beside(held(step.state), v5p.HBM_BYTES):  # else training waits, and no copy is made
        programs["copy"] = (saving.copying(step.state), state, 0)
    found, refused = {}, ""
    for name, (jitted, args, beside_bytes) in programs.items():
        try:
            found[name] = beside_bytes + needed_bytes(jitted.lower(*args).compile().memory_analysis())
        except JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            found[name] = max(beside_bytes + needed, int(v5p.HBM_BYTES) + 1)
            refused = refused or f"{name}: {str(error).splitlines()[0]}"
    return found, refused


def needed_bytes(memory: Any) -> int:
    """Of one program by its `memory_analysis()`; what is donated counts once."""
    return int(
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def held(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs that one device holds."""
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def out_of_memory(message: str) -> int | None:
    """The bytes that the compiler says are too much, of its refusal; None for another error.

    "... the total memory required for HLO temporaries (474.42G) exceeds available HBM (95.73G)", and, of a program
    whose temporaries alone would fit, "Used 120.50G of 95.74G hbm".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|[Uu]sed ([\d.]+)([KMGT]) of", message)
    if not found:
        return 0
    number, unit = (found.group(1), found.group(2)) if found.group(1) else (found.group(3), found.group(4))
    return int(float(number) * 1024 ** " KMGT".index(unit))


def stacked(module: hlo.Module, pairs: int) -> tuple[int, int]:
    """Bytes that the loops over layer pairs write a pair at a time: forward (kept for backward), and backward."""
    forward = backward = 0
    for where, i, _ in hlo.executed(module):
        if i.opcode != "while" or pairs < 2 or hlo.trip_count(module, where, i) != pairs:
            continue
        body = module.computations[str(i.attribute("body"))]
        written = 0
        for at, name in enumerate(body.root.operands):
            same = body.by_name[name].opcode == "get-tuple-element" and body.by_name[name].attribute("index") == str(at)
            if not same and i.arrays[at].shape[:1] == (pairs,):
                written += i.arrays[at].bytes
        if "transpose(" in i.attributes:
            backward += written
        else:
            forward += written
    return forward, backward


def main() -> None:
    os.environ |= QUIET
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever asked is gone: nobody waits for the answer
    out, sys.stdout = sys.stdout, sys.stderr
    job: Job = pickle.load(sys.stdin.buffer)
    serves = job.program.serve is not None
    json.dump(asdict(serving_ahead.facts(job.program, job.topology) if serves else facts(job)), out)


if __name__ == "__main__":
    main()
