"""What can be refused before anything is started, besides the config itself."""

import contextlib
import math
import os
import socket
from pathlib import Path

from rich.console import Console

from gemma.config import ConfigError, naming
from gemma.plan import analytic, flops, v5p
from gemma.text import corpus, tokenizer
from orchestrator.config import Config
from orchestrator.plan import ahead, plan, search, serving
from orchestrator.record import rundir, source
from orchestrator.slices import metadata
from orchestrator.slices.cluster import check_complete

ANSWER_TIMEOUT_S = 2.0
MOST_SIMULATED_HOSTS = 64
FAR_BELOW = 0.25  # of HBM by arithmetic: no compiler is asked
LARGEST_TUNING_LR = 5e-5  # above it trained weights are commonly spoilt
HOST_BYTES = 300 << 20  # Python, JAX and a Ray node


def check(config: Config) -> None:
    """Raises ConfigError. Data, tokenizer and weights are looked at where they are this machine's: elsewhere the hosts
    look.
    """
    if config.train.tokens is not None:
        steps = math.ceil(config.train.tokens / (config.train.batch * config.data.sequence))
        raise ConfigError(f"train.tokens={config.train.tokens:g}: only launch.plan takes it; give train.steps={steps}")
    if config.train.init_from is not None and config.optim.lr > LARGEST_TUNING_LR:
        Console(stderr=True, soft_wrap=True).print(
            f"optim.lr={config.optim.lr:g} with train.init_from: a rate for training from scratch, which soon undoes"
            f" trained weights; usual are 1e-6 to {LARGEST_TUNING_LR:g}"
        )
    if config.detach:
        return  # the rest is looked at on the machine that will drive the run
    if source.is_submitted():
        check_stays()
    with naming(f"run.root={config.run.root}"):
        check_directory("run.root", config.run.root)
    if config.cluster.kind == "ray":
        check_address(str(config.cluster.address))
    if config.cluster.gcp is not None:
        from orchestrator.slices import gcp, head, startup  # half a second that other runs do not pay

        startup.script(config.cluster.gcp)
        gcp.api(config.cluster.gcp)
        head.check(config.cluster, config.cluster.gcp)
    if config.cluster.gke is not None:
        from orchestrator.slices import kube

        check_complete(config.cluster.gke)
        claim, mount = config.cluster.gke.claim, config.cluster.gke.mount
        if not Path(config.run.root).expanduser().absolute().is_relative_to(mount):
            raise ConfigError(
                f"run.root={config.run.root}: the hosts see cluster.gke.claim={claim} at cluster.gke.mount={mount};"
                f" give run.root={mount.rstrip('/')}/..., with the same storage mounted there on this machine"
            )
        kube.check(config.cluster.gke)
    if config.cluster.kind == "local":
        check_size(config)
        if config.train.gradients_in == "bfloat16" and config.program.mesh.fsdp > 1:
            raise ConfigError(
                f"train.reduce_dtype={config.train.reduce_dtype} train.dtype={config.train.dtype}: XLA aborts on CPUs"
                " where bfloat16 is summed over mesh.fsdp; with cluster=local give train.reduce_dtype=float32"
            )
        with naming(f"run.cache={config.run.cache}"):
            check_directory("run.cache", config.run.cache)
        if config.train.init_from is not None:
            from gemma.weights import sources  # a tenth of a second that other runs do not pay

            sources.check_model("train.init_from", config.train.init_from, config.model)
        if config.evaluate is not None:
            from gemma.weights import sources

            sources.check_model("evaluate.weights", config.evaluate.weights, config.model, config.evaluate.step)
        if config.serve is not None:
            from gemma.weights import sources

            sources.check_model("serve.checkpoint", config.serve.checkpoint, config.model, config.serve.step)
            if config.serve.follow and not rundir.committed(Path(config.serve.checkpoint).expanduser()):
                raise ConfigError(f"serve.follow=true: {config.serve.checkpoint} is no run: nothing newer will come")
            if config.serve.filter_weights is not None:
                coder = tokenizer.load(config.data.tokenizer)
                sources.check_judge("serve.filter_weights", config.serve.filter_weights, coder)
            return
        corpus.check(config.data, config.train.batch)
        for name, path in (config.eval.sets or {}).items():
            corpus.check(corpus.eval_set(config.data, path), 0, f"eval.sets.{name}")
        coder = tokenizer.load(config.data.tokenizer)
        if coder.vocab > config.model.vocab:
            raise ConfigError(
                f"model.vocab={config.model.vocab}: data.tokenizer={config.data.tokenizer} makes {coder.vocab} ids;"
                f" give model.vocab={-(-coder.vocab // 128) * 128} or a larger model"
            )


def check_stays() -> None:
    """A submitted controller must not be on a machine that may be taken away, where the machine can tell."""
    with contextlib.suppress(OSError):  # not a machine of Google's
        if metadata.value_of(os.environ.get("GCE_METADATA_HOST", metadata.HOST), "scheduling/preemptible") == "TRUE":
            raise ConfigError(
                "detach=true: the head of the Ray cluster is a preemptible machine, and a controller there would go"
                " with it; start the head on one that stays"
            )


def check_size(config: Config) -> None:
    """A slice simulated on this machine must fit in it."""
    hosts, count = config.hosts * config.replicas, f"cluster.num_slices={config.cluster.num_slices}"
    count = f"serve.replicas={config.replicas}" if config.replicas > 1 else count
    if hosts > MOST_SIMULATED_HOSTS:
        raise ConfigError(
            f"cluster.slice={config.cluster.slice} {count}: {hosts} hosts"
            f" are too many for cluster=local, which simulates them here; allowed are {MOST_SIMULATED_HOSTS}"
        )
    # Weights, gradients and the two moments, float32. Replicas each hold all of them.
    state_bytes = 16 * sum(flops.parameters(config.model)) * config.program.mesh.replica
    needed_bytes = state_bytes + config.hosts * HOST_BYTES
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed_bytes > memory_bytes:
        raise ConfigError(
            f"model={config.model.name}: on cluster=local, {config.hosts} simulated hosts need about"
            f" {needed_bytes / 1e9:.0f} GB and this machine has {memory_bytes / 1e9:.0f} GB; a smaller model or slice"
            " fits, or cluster=ray"
        )


def check_fits(config: Config) -> None:
    """Compiles the programs for the slices before any is asked for. Raises ConfigError naming what fits."""
    if config.cluster.kind == "local" or config.plan.skip or config.evaluate is not None:
        return
    if config.serve is not None:
        check_served(config)
        return
    if analytic.hbm_bytes(config.program) < FAR_BELOW * v5p.HBM_BYTES:
        return
    with Console(stderr=True).status("") as status:

        def tell(what: str, elapsed_s: float) -> None:
            status.update(f"compiling {what}, to see whether it fits: {elapsed_s:.0f} s")

        try:
            answer = ahead.facts_of(config, tell)
            made = plan.make(config, answer.facts, [], answer.cached)
            found = None if made.fits else search.nearest(config, tell)
        except ahead.CompilerError as error:
            raise ConfigError(f"plan: {error}; plan.skip=true goes on without it") from error
    if made.fits:
        return
    larger = f"none on a {config.cluster.slice}; python -m launch.plan with plan.smallest=true looks for a slice"
    fitting = " ".join(search.overrides(found, [])) if found else larger
    shown = " ".join(f"mesh.{axis}={size}" for axis, size in made.mesh.items())
    also = f" ({plan.WITHOUT_COPIES})" if made.message == plan.WITHOUT_COPIES else ""
    whose = "" if made.largest == "train" else f" for the program `{made.largest}`"
    raise ConfigError(
        f"{shown}: needs {made.needed_bytes / 1e9:.1f} GB of {v5p.HBM_BYTES / 1e9:.0f} GB HBM a chip{whose} with"
        f" train.remat={config.train.remat}{also}; nearest that fits: {fitting} (plan.skip=true overrides)"
    )


def check_served(config: Config) -> None:
    """Weights and one sequence must fit on the chips; the cache takes what is left. By arithmetic alone."""
    program, serve = config.program, config.serve
    assert serve is not None
    width = 1 if serve.weights == "int8" else serving.BYTES[serve.weights]
    weights = sum(flops.parameters(config.model)) * width / (program.mesh.tensor * program.mesh.fsdp)
    context = min(serve.context or config.model.context, config.model.context)
    needed = weights + serving.read_bytes(config, context, 1)
    if needed > v5p.FREE_SHARE * v5p.HBM_BYTES:
        raise ConfigError(
            f"mesh.fsdp={program.mesh.fsdp} mesh.tensor={program.mesh.tensor}: weights and one sequence of {context}"
            f" need {needed / 1e9:.1f} GB a chip, and have {v5p.FREE_SHARE * v5p.HBM_BYTES / 1e9:.1f} GB; give a larger"
            " cluster.slice, or serve.weights=bfloat16 (plan.skip=true overrides)"
        )


def check_directory(key: str, root: str) -> None:
    """The directory exists and can be written, or can be made."""
    if not root:
        raise ConfigError(f"{key}=: empty; give a directory")
    path = Path(root).expanduser().absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise ConfigError(f"{key}={root}: {path} is a file, not a directory")
    if not os.access(path, os.W_OK | os.X_OK) or path.is_relative_to("/proc"):
        raise ConfigError(f"{key}={root}: {path} cannot be written")


def check_address(address: str) -> None:
    """Something listens there: Ray itself would try for minutes."""
    if address == "auto" or address.startswith("ray://"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"cluster.address={address}: must be HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cluster.address={address}: nothing answers there ({error})") from error
