"""A server's programs, compiled for TPUs that are not here, and what the compiler says of them.

Run by `gemma.plan.compile_ahead`, as a run's programs are.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma.config import Program
from gemma.plan import hlo
from gemma.plan.hlo_cost import Cost, Place, cost


@dataclass(frozen=True)
class Step:
    """One program in one call. needed_bytes: what a chip must hold while it runs."""

    size: int  # rows of a decode step, tokens of a prefill chunk
    needed_bytes: int
    cost: Cost | None  # None where it does not fit
    message: str = ""  # why


@dataclass(frozen=True)
class ServingFacts:
    """Of one chip. Costs are without what the paged kernel does: that follows from the rows' lengths."""

    message: str  # why a program does not fit, or nothing
    weights_bytes: int
    cache_bytes: int
    cache_tokens: int  # positions that the pages of global layers hold
    page: int
    decode: tuple[Step, ...]
    choice: tuple[Step, ...]  # of the next tokens, after each decode step
    prefill: tuple[Step, ...]
    compile_s: float


def facts(program: Program, topology: str) -> ServingFacts:
    """Compiles a decode step of each size, the choice of a token, and the largest chunk of a prompt."""
    import jax
    from jax.experimental import topologies

    from gemma.engine import engine as engines
    from gemma.engine import server
    from gemma.engine.forward import Shape
    from gemma.model.sharding import make_mesh
    from gemma.plan.compile_ahead import held

    assert program.serve is not None
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"v5p:{topology}")
    mesh = make_mesh(program.mesh, described.devices)
    dtypes = server.dtypes_of(program.serve, "tpu")
    limits = server.limits_of(program.serve, program.model, dtypes, "tpu", program.mesh)
    params = server.abstract_params(program.model, mesh, dtypes.loaded)
    started = time.monotonic()
    with jax.set_mesh(mesh):  # of the devices that are described: the kernel asks which they are
        wanted = engines.programs(Shape(program.model, dtypes.computed, mesh, dtypes.int8), params, limits)
        weights, state = wanted["decode", limits.rows[0]].arguments[:2]
        weights_bytes, chunk = held(weights), limits.chunks[-1]
        decode = [compiled(wanted["decode", rows], mesh, rows) for rows in limits.rows]
        choice = [compiled(wanted["pick", rows, False], mesh, rows, weights_bytes) for rows in limits.rows]
        prefill = [compiled(wanted["prefill", chunk], mesh, chunk)]
    return ServingFacts(
        message=next((step.message for step in (*decode, *choice, *prefill) if step.message), ""),
        weights_bytes=weights_bytes,
        cache_bytes=held(state.cache),
        cache_tokens=(limits.global_pages - 1) * limits.page,
        page=limits.page,
        decode=tuple(decode),
        choice=tuple(choice),
        prefill=tuple(prefill),
        compile_s=time.monotonic() - started,
    )


def compiled(program: Any, mesh: Any, size: int, beside_bytes: int = 0) -> Step:
    """beside_bytes: what lies on a chip besides the program's own."""
    from jax.errors import JaxRuntimeError

    from gemma.plan.compile_ahead import needed_bytes, out_of_memory

    with tempfile.TemporaryDirectory(prefix="plan-") as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            made = program.jitted.lower(*program.arguments).compile(compiler_options=options)
        except JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            return Step(size, beside_bytes + needed, None, str(error).splitlines()[0])
        (text,) = Path(dump).glob("*after_codegen.txt")
        module = hlo.parse(text.read_text())
    places = [Place(0, tuple(device.coords)) for device in mesh.devices.flat]
    needed = beside_bytes + needed_bytes(made.memory_analysis())
    return Step(size, needed, cost(module, dict(mesh.shape), places))
