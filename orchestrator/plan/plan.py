"""What a run needs and how fast it can be, told before a slice is paid for: pure, from the compiler's facts."""

from dataclasses import dataclass
from typing import Any

from gemma.plan import analytic, flops, v5p
from orchestrator.config import Config

AGREES = 1.5  # within this factor the compiler's own count is believed, else its rule alone
SECONDS_A_DAY = 86400.0
WITHOUT_COPIES = "it does with checkpoint.snapshot=off checkpoint.every=0"


@dataclass(frozen=True)
class Hbm:
    """Bytes of one chip. copies are those of the state that are on their way to host memory and to disk during a step.
    workspace is all that the compiler sets aside besides what is named, and the code.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    workspace: int
    copies: int
    total: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. compute, hbm and network are bounds: the work over what the chip can do at most.

    estimate is the compiler's own cost model (`cost_analysis()["optimal_seconds"]`) with loops counted as often as they
    run. It is blind to what a kernel computes and to the network; serial adds both, nothing overlapped. cycles is the
    sum of the cycles that the compiler's code generator expects of each fusion, kernels at peak, no network: a harsher
    judge of the same program.
    """

    compute: float
    hbm: float
    network: float
    estimate: float
    kernels: float
    serial: float
    cycles: float


@dataclass(frozen=True)
class Plan:
    fits: bool
    message: str  # why it does not fit
    parameters: dict[str, int]  # embedding, other
    hbm_bytes: Hbm  # of the train step
    programs_bytes: dict[str, int]  # of every program of a run: what a chip must hold while it runs
    largest: str  # of them: what decides whether the run fits
    hbm_limit_bytes: int
    flops: dict[str, float]  # model, hlo: of a step, all chips
    sent_bytes: dict[str, dict[str, float]]  # mesh axes: kind: bytes that a chip sends in a step
    reduce_dtype: str  # of gradients over `fsdp`
    gradients: dict[str, dict[str, float]]  # by that dtype: what a chip sends of them in a step, and for how long
    step_s: StepTime | None  # None where it does not fit
    mfu: float | None  # at the estimate
    mfu_at: dict[str, float]  # at each of step_s
    tokens_per_s: float | None  # of all chips, at the estimate
    tokens: float  # of the whole training
    chip_hours: float | None
    days: float | None
    mesh: dict[str, int]
    slice: str
    topology: str
    num_slices: int
    chips: int
    remat: str
    batch: int
    overrides: list[str]  # what makes launch.train run this
    compile_s: float  # of the compiler, when it was asked first
    cached: bool

    @property
    def needed_bytes(self) -> int:
        return self.programs_bytes[self.largest]


def make(config: Config, facts: dict[str, Any], overrides: list[str], cached: bool) -> Plan:
    """facts: `gemma.plan.compile_ahead.Facts` as JSON gives them."""
    program, chips = config.program, config.chips
    step_flops = float(flops.step_flops(program.model, program.train.batch, program.data.sequence))
    embedding, other = flops.parameters(program.model)
    step_bytes = facts["needed_bytes"]
    named = {name: int(facts[f"{name}_bytes"]) for name in ("parameters", "optimizer", "gradients", "activations")}
    copies = analytic.state_copies(program) * (named["parameters"] + named["optimizer"])
    workspace = max(step_bytes - sum(named.values()), 0)
    hbm = Hbm(**named, workspace=workspace, copies=copies, total=step_bytes + copies)
    # A snapshot and a save may be on their way while an evaluation runs, as beside a step.
    others = {name: size + (copies if name == "eval" else 0) for name, size in facts["programs_bytes"].items()}
    programs = {"train": hbm.total, **others}
    largest = max(programs, key=lambda name: programs[name])
    fits = facts["fits"] and programs[largest] <= v5p.HBM_BYTES
    step = step_time(facts) if facts["cost"] else None
    mfu_at = (
        {k: step_flops / (chips * v5p.FLOPS * s) for k, s in vars(step).items() if s > 0 and k != "kernels"}
        if step
        else {}
    )
    tokens_a_step = program.train.batch * program.data.sequence
    tokens = program.train.tokens or float(program.train.steps * tokens_a_step)
    seconds = tokens / tokens_a_step * step.estimate if step else None
    return Plan(
        fits=fits,
        message=facts["message"] or ("" if fits or programs[largest] - copies > v5p.HBM_BYTES else WITHOUT_COPIES),
        parameters={"embedding": embedding, "other": other},
        hbm_bytes=hbm,
        programs_bytes=programs,
        largest=largest,
        hbm_limit_bytes=int(v5p.HBM_BYTES),
        flops={"model": step_flops, "hlo": facts["cost"]["flops"] * chips if step else 0.0},
        sent_bytes=facts["cost"]["sent_bytes"] if step else {},
        reduce_dtype=program.train.gradients_in,
        gradients=gradients(program.train.gradients_in, facts["cost"]) if step else {},
        step_s=step,
        mfu=mfu_at.get("estimate"),
        mfu_at=mfu_at,
        tokens_per_s=tokens_a_step / step.estimate if step else None,
        tokens=tokens,
        chip_hours=seconds * chips / 3600 if seconds is not None else None,
        days=seconds / SECONDS_A_DAY if seconds is not None else None,
        mesh=dict(zip(("replica", "fsdp", "tensor"), program.mesh.shape, strict=True)),
        slice=config.cluster.slice,
        topology=config.slice.topology,
        num_slices=config.cluster.num_slices,
        chips=chips,
        remat=program.train.remat,
        batch=program.train.batch,
        overrides=overrides,
        compile_s=facts["compile_s"],
        cached=cached,
    )


def gradients(compiled_in: str, cost: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The price of train.reduce_dtype. Of the dtype that was compiled as the program has it, of the other by widths."""
    sent = cost["sent_bytes"].get("fsdp", {}).get("reduce-scatter", 0.0)
    widths = {"bfloat16": 2, "float32": 4}
    shares = {name: width / widths[compiled_in] for name, width in widths.items()}
    return (
        {n: {"sent_bytes": sent * s, "network_s": cost["gradients_s"] * s} for n, s in shares.items()} if sent else {}
    )


def step_time(facts: dict[str, Any]) -> StepTime:
    cost = facts["cost"]
    ratio = facts["optimal_s"] / cost["roofline_once_s"]
    if not 1 / AGREES < ratio < AGREES:  # it counts -1 s for each transfer between slices, and says nothing of others
        ratio = 1.0
    estimate = cost["roofline_s"] * ratio
    return StepTime(
        compute=cost["flops"] / v5p.FLOPS,
        hbm=cost["hbm_bytes"] / v5p.HBM_BYTES_PER_S,
        network=cost["network_s"],
        estimate=estimate,
        kernels=cost["kernels_s"],
        serial=estimate + cost["kernels_s"] + cost["network_s"],
        cycles=cost["cycles_s"],
    )
