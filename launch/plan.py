"""python -m launch.plan key=value ...: whether a run fits its slices and how fast it can be, without any TPU."""

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from gemma.config import ConfigError
from launch.command import CONF, arguments, main
from orchestrator import config as configs
from orchestrator.plan import ahead, plan, search, serving
from orchestrator.record.jsonfile import dumps

USAGE = """Compile the programs of a run for TPU v5p on a machine without TPUs: does it fit, how fast can it be.

  python -m launch.plan model=gemma2_27b cluster.slice=v5p-1024 mesh.fsdp=512 data.sequence=8192 train.batch=512
  python -m launch.plan ... output=json                 JSON on standard output, alone there
  python -m launch.plan ... train.tokens=13e12          chip-hours and days for so many tokens
  python -m launch.plan ... plan.search=true            meshes, remat and batch; what the command line gives stays
  python -m launch.plan ... plan.smallest=true          the smallest slice that suffices, the fastest there
  python -m launch.plan serve=true model=gemma2_9b serve.slots=64 mesh.tensor=4 mesh.fsdp=1
                                                        of launch.serve: the cache, tokens/s, time to the first token

Any override of launch.train is one here, with serve=true of launch.serve. Train computes in bfloat16 (train.dtype). An
answer is remembered by config and versions, in run.cache/plans. Exit code 0 where it fits, 2 where it does not, 1 for a
mistake."""


def composed(overrides: list[str], of: str = "plan") -> configs.Config:
    """of: a file of conf/."""
    with initialize_config_dir(CONF, version_base="1.3"):
        container = OmegaConf.to_container(compose(of, overrides), resolve=True)
    assert isinstance(container, dict)
    sections = {str(key): value for key, value in container.items()}
    config = configs.crossed(sections)
    return config if config.plan.search or config.plan.smallest else configs.from_container(sections)


def work() -> int:
    own, overrides = arguments({"output": "text", "serve": "false"}, USAGE)
    if own["serve"] not in ("true", "false"):
        raise ConfigError(
            f"serve={own['serve']}: allowed are true and false; of a server's settings give serve.KEY=VALUE"
        )
    if own["output"] not in ("text", "json"):
        raise ConfigError(f"output={own['output']}: allowed are text and json")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the compiler is stopped too
    console = Console(stderr=True)
    with console.status("") as status:

        def tell(what: str, elapsed_s: float) -> None:
            status.update(f"compiling {what}: {elapsed_s:.0f} s (27B takes one to three minutes)")

        try:
            found = serving_plans(overrides, tell) if own["serve"] == "true" else plans(overrides, tell)
        except ahead.CompilerError as error:
            status.stop()
            print(f"plan: {error}", file=sys.stderr)
            return 2
    if own["output"] == "json":
        print(dumps(as_json(found), indent=2))
    else:
        show(found)
    return 0 if found[0].fits else 2


def plans(overrides: list[str], tell: ahead.Tell) -> list[plan.Plan]:
    """The best first; one where nothing is searched for."""
    overridden = {override.partition("=")[0].lstrip("+") for override in overrides}
    plain = [o for o in overrides if not o.startswith(("plan.", "train.tokens", "run."))]
    config = composed(overrides)
    if config.plan.smallest:
        return search.smallest(config, overridden, plain, tell)
    if config.plan.search:
        return search.best(config, overridden, plain, tell)
    answer = ahead.facts_of(config, tell)
    return [plan.make(config, answer.facts, plain, answer.cached)]


def serving_plans(overrides: list[str], tell: ahead.Tell) -> list[serving.ServingPlan]:
    """The same of a server."""
    overridden = {override.partition("=")[0].lstrip("+") for override in overrides}
    plain = [o for o in overrides if not o.startswith(("plan.", "run."))]
    config = composed(overrides, "serve")
    if (config.mesh.fsdp, config.mesh.tensor) == (-1, -1):  # as on a real slice, also where none is named
        config = replace(config, mesh=replace(config.mesh, tensor=config.head_ways))
    if config.plan.smallest:
        raise ConfigError(
            "plan.smallest=true: of a server the smallest slice, v5p-8, holds every Gemma 2; give serve=false"
        )
    if config.plan.search:
        return serving.best(config, overridden, plain, tell)
    answer = ahead.facts_of(config, tell)
    return [serving.make(config, answer.facts, plain, answer.cached)]


def as_json(found: Sequence[plan.Plan | serving.ServingPlan]) -> dict[str, Any]:
    best = asdict(found[0])
    return best | ({"ranking": [asdict(p) for p in found]} if len(found) > 1 else {})


def show(found: Sequence[plan.Plan | serving.ServingPlan]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    if len(found) > 1:
        console.print(ranking(found))
    best = found[0]
    for line in lines(best) if isinstance(best, plan.Plan) else serving_lines(best):
        console.print(line, markup=False)


def ranking(found: Sequence[plan.Plan | serving.ServingPlan]) -> Table:
    table = Table(title=f"{found[0].slice}: what was compiled, the best first")
    trained = [p for p in found if isinstance(p, plan.Plan)]
    speeds = ("step s", "MFU", "tokens/s") if trained else ("decode step s", "tokens/s", "first token s")
    for column in ("fits", "HBM GB", *speeds, "overrides"):
        table.add_column(column, justify="left" if column in ("fits", "overrides") else "right")
    for p in found:
        speed = trained_speed(p) if isinstance(p, plan.Plan) else served_speed(p)
        table.add_row("yes" if p.fits else "no", f"{p.needed_bytes / 1e9:.1f}", *speed, " ".join(p.overrides))
    return table


def trained_speed(p: plan.Plan) -> tuple[str, str, str]:
    return (f"{p.step_s.serial:.2f}", f"{p.mfu:.1%}", f"{p.tokens_per_s:,.0f}") if p.step_s else ("", "", "")


def served_speed(p: serving.ServingPlan) -> tuple[str, str, str]:
    if not p.decode:
        return "", "", ""
    return f"{p.decode[-1].estimate:.4f}", f"{p.decode[-1].tokens_per_s:,.0f}", f"{p.first_token_s:.3f}"


def serving_lines(p: serving.ServingPlan) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())
    out = [
        f"{'fits' if p.fits else 'DOES NOT FIT'}: {p.needed_bytes / 1e9:.2f} GB of {p.hbm_limit_bytes / 1e9:.0f} GB HBM"
        " a chip" + (f" ({p.message})" if p.message else ""),
        f"slice       {p.slice} ({p.topology}, {p.chips} chips), mesh {mesh}",
        f"HBM, GB     weights {p.weights_bytes / 1e9:.2f}, cache {p.cache_bytes / 1e9:.2f} (a chip)",
        f"cache       {p.cache_tokens:,} positions: {p.sequences} sequences of {p.length:,}",
    ]
    out += [
        f"decode      {step.rows} x {p.length:,}: {step.estimate * 1e3:.2f} ms, {step.tokens_per_s:,.0f} tokens/s;"
        f" {step.over_ideal:.2f} x reading weights and cache ({step.ideal * 1e3:.2f} ms);"
        f" network {step.network * 1e3:.2f} ms; by cycles {step.cycles * 1e3:.2f} ms"
        for step in p.decode
    ]
    if p.first_token_s is not None and p.prompt_tokens_per_s is not None and p.chunk_s is not None:
        out.append(
            f"prompt      {p.length:,} tokens: first token after {p.first_token_s:.3f} s, {p.prompt_tokens_per_s:,.0f}"
            f" tokens/s; its last chunk of {p.chunk} {p.chunk_s * 1e3:.1f} ms, which decoding waits for"
        )
    out.append(f"compiled    {'remembered; took' if p.cached else 'in'} {p.compile_s:.0f} s")
    if not p.fits:
        return [*out, "what fits   plan.search=true tries other meshes of this slice; or fewer serve.cache_tokens"]
    line = shlex.join(p.overrides)
    out.append(f"run it      python -m launch.serve weights=FOLDER cluster=ray cluster.address=HOST:PORT {line}")
    return out


def lines(p: plan.Plan) -> list[str]:
    gb = {name: f"{size / 1e9:.2f}" for name, size in asdict(p.hbm_bytes).items()}
    slices = f"{p.num_slices} x " if p.num_slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())
    limit = p.hbm_limit_bytes / 1e9
    out = [
        f"{'fits' if p.fits else 'DOES NOT FIT'}: {p.needed_bytes / 1e9:.2f} GB of {limit:.0f} GB HBM a chip,"
        f" by the program `{p.largest}`" + (f" ({p.message})" if p.message else ""),
        f"slice       {slices}{p.slice} ({p.topology}, {p.chips} chips in all), mesh {mesh}",
        f"parameters  {p.parameters['embedding']:,} embedding, {p.parameters['other']:,} other",
        f"HBM, GB     parameters {gb['parameters']}, optimizer {gb['optimizer']}, gradients {gb['gradients']},"
        f" activations {gb['activations']}, workspace {gb['workspace']}, copies {gb['copies']}",
    ]
    others = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in p.programs_bytes.items())
    out.append(f"programs    {others} (GB a chip holds while it runs)")
    if p.step_s and p.mfu and p.tokens_per_s and p.days is not None and p.chip_hours is not None:
        recomputed = p.flops["hlo"] / p.flops["model"]
        out.append(f"FLOPs       model {p.flops['model']:.3e}, HLO {p.flops['hlo']:.3e} a step ({recomputed:.2f} x)")
        for axes, kinds in p.sent_bytes.items():
            sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in kinds.items())
            out.append(f"sent, GB    over {axes}: {sent} (a chip, a step)")
        if p.gradients:
            told = [f"{d} {g['sent_bytes'] / 1e9:.2f} GB, {g['network_s']:.3f} s" for d, g in p.gradients.items()]
            out.append(
                f"gradients   summed over fsdp in {'; in '.join(told)} (train.reduce_dtype, now {p.reduce_dtype})"
            )
        for name, seconds in asdict(p.step_s).items():
            share = f"MFU {p.mfu_at[name]:.1%}" if name in p.mfu_at else ""
            out.append(f"step        {MEANING[name]:<46} {seconds:8.4f} s  {share}")
        out.append(f"speed       {p.tokens_per_s:,.0f} tokens/s at the estimate")
        out.append(f"cost        {p.chip_hours:,.0f} chip-hours, {p.days:,.2f} days for {p.tokens:.3g} tokens")
        out.append(f"compiled    {'remembered; took' if p.cached else 'in'} {p.compile_s:.0f} s")
    if not p.fits:
        return [*out, "what fits   plan.search=true tries other meshes of this slice, plan.smallest=true larger slices"]
    out.append(f"run it      python -m launch.train cluster=ray cluster.address=HOST:PORT {shlex.join(p.overrides)}")
    return out


MEANING = {
    "compute": "bound by compute (HLO FLOPs at peak)",
    "hbm": "bound by HBM (bytes at full bandwidth)",
    "network": "bound by network (bytes over the links)",
    "estimate": "the compiler's estimate",
    "kernels": "attention kernels, which it does not see",
    "serial": "both and the network, nothing overlapped",
    "cycles": "the code generator's cycles and kernels",
}

if __name__ == "__main__":
    main("plan", work)
