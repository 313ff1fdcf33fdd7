"""The whole configuration: crossed once, strictly, from Hydra's plain container into frozen dataclasses."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import dacite

from gemma.config import (
    Checkpoint,
    ConfigError,
    Data,
    Eval,
    Evaluate,
    Guard,
    Mesh,
    Model,
    Optim,
    Profile,
    Program,
    Replicas,
    Serve,
    Train,
    check,
    fill,
    require,
    require_at_least,
    require_local,
)
from gemma.plan import flops, v5p
from gemma.schedule import resolved
from orchestrator.chaos import faults
from orchestrator.chaos.faults import Chaos
from orchestrator.slices.cluster import NAME, Cluster
from orchestrator.slices.topology import CHIPS_PER_HOST, Slice, slice_type

LARGEST_INT = 2**32  # of any setting; some have smaller bounds of their own
WANDB_NAME = r"[A-Za-z0-9._-]{1,128}"


@dataclass(frozen=True)
class Run:
    id: str | None  # given or made; also wandb's id
    root: str
    cache: str  # of tokens and compiled programs, on every host

    def __post_init__(self) -> None:
        ok = self.id is None or re.fullmatch(NAME, self.id)
        require(bool(ok), f"run.id={self.id}: letters, digits, '-' and '_', at most 64, none of the last two in front")
        require_local("run.root", self.root)
        require_local("run.cache", self.cache)
        require(self.id != "latest", "run.id=latest: means the newest run; give another name")


@dataclass(frozen=True)
class Wandb:
    mode: Literal["auto", "online", "offline", "disabled"]  # auto: online where there is a key
    project: str
    entity: str | None

    def __post_init__(self) -> None:
        for key in ("project", "entity"):
            name = getattr(self, key)
            ok = name is None or re.fullmatch(WANDB_NAME, name)
            require(bool(ok), f"wandb.{key}={name!r}: letters, digits, '.', '-' and '_', at most 128")


@dataclass(frozen=True)
class Retry:
    budget: int  # failures since the last newly committed step, before the run gives up

    def __post_init__(self) -> None:
        require_at_least("retry", {"budget": self.budget}, 0)


@dataclass(frozen=True)
class Fitness:
    """Of chips, looked at before they train on hosts that are new to the run."""

    check: bool
    slow_factor: float | None  # a chip that takes so many times what is usual is slow; None is off
    free_share: float  # of the memory that the emptiest chip has free: with less, somebody else holds it

    def __post_init__(self) -> None:
        factor, share = self.slow_factor, self.free_share
        require(factor is None or factor > 1, f"fitness.slow_factor={factor}: must be above 1, or null")
        require(0 <= share <= 1, f"fitness.free_share={share}: must lie between 0 and 1")


@dataclass(frozen=True)
class Timeout:
    """Deadlines in seconds; every wait has one."""

    reserve_s: float  # slices are placed
    start_s: float  # host processes are up and have found each other
    check_s: float  # a host has looked at its chips; all chips have heard of each other
    tokenize_s: float  # the text is tokenised, or found in the cache and checked
    compile_s: float  # programs are ready
    restore_s: float
    step_s: float  # the first steps of an attempt; after that a hang is what takes far longer than the steps before
    hang_s: float  # but no stall shorter than this is one
    save_s: float
    stop_s: float  # processes are gone
    shrink_s: float  # a lost slice is replaced, before the run goes on with fewer
    replace_s: float  # a lost slice is replaced, where the run cannot

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(0 < value < 1e9, f"timeout.{field.name}={value}: must be above 0 and below 1e9 seconds")


@dataclass(frozen=True)
class Planning:
    search: bool
    smallest: bool
    compiles: int
    skip: bool
    length: int  # of a server: positions that each sequence has while it decodes, and tokens of a prompt

    def __post_init__(self) -> None:
        require_at_least("plan", {"compiles": self.compiles, "length": self.length}, 1)


@dataclass(frozen=True)
class Resume:
    allow_data_change: bool


@dataclass(frozen=True)
class Config:
    run: Run
    model: Model
    data: Data
    mesh: Mesh
    optim: Optim
    train: Train
    eval: Eval
    checkpoint: Checkpoint
    profile: Profile
    guard: Guard
    cluster: Cluster
    wandb: Wandb
    retry: Retry
    fitness: Fitness
    timeout: Timeout
    plan: Planning
    chaos: Chaos
    resume: Resume
    evaluate: Evaluate | None  # the program of launch.evaluate; null trains
    serve: Serve | None  # the program of launch.serve
    detach: bool  # the controller is a job on the head of the Ray cluster

    def __post_init__(self) -> None:
        if self.detach:
            check_detached(self.cluster, self.run)

    @property
    def slice(self) -> Slice:
        return slice_type(self.cluster.slice, self.cluster.topology)

    @property
    def hosts(self) -> int:
        return self.slice.hosts * self.cluster.num_slices

    @property
    def chips(self) -> int:
        """That work on one thing: of all slices, or of a server's replica."""
        return self.slice.chips * self.cluster.num_slices

    @property
    def replicas(self) -> int:
        """Slices that serve by themselves, at most; a run of another kind counts as one."""
        return self.serve.replicas.max if self.serve else 1

    @property
    def scales(self) -> bool:
        """Whether slices come and go with the load."""
        return self.serve is not None and self.serve.replicas.min < self.serve.replicas.max

    @property
    def asks(self) -> bool:
        """Whether it is an evaluation that puts requests: it reads no text."""
        return self.evaluate is not None and self.evaluate.asks

    @property
    def filled_mesh(self) -> Mesh:
        """Of a server that leaves fsdp and tensor open, heads go over as many chips as they can. The chips of a
        simulated host are one processor's: there a server takes one of them. An evaluation that puts requests has the
        weights on every chip, where half its memory holds them: then chips never wait for one another.
        """
        if self.asks:
            return self.asking_mesh if self.serve is None else self.host_mesh
        if self.serve is None or (self.mesh.fsdp, self.mesh.tensor) != (-1, -1):
            return fill(self.mesh, self.chips)
        if self.cluster.kind == "local":
            return Mesh(1, 1, 1) if self.hosts == 1 else Mesh(1, self.chips, 1)
        return Mesh(1, self.chips // self.head_ways, self.head_ways)

    @property
    def asking_mesh(self) -> Mesh:
        tensor, local = max(1, self.mesh.tensor), self.cluster.kind == "local"
        chips = 1 if local and self.hosts == 1 and tensor == 1 else self.chips
        weights = sum(flops.parameters(self.model)) * (4 if self.train.dtype == "float32" else 2) // tensor
        if local or weights <= v5p.HBM_BYTES / 2:
            return fill(Mesh(-1, 1, tensor), chips)
        return fill(Mesh(self.cluster.num_slices, -1, tensor), chips)

    @property
    def host_mesh(self) -> Mesh:
        """Of a host that writes texts by itself: an evaluation's texts are shared out among the hosts."""
        if self.cluster.kind == "local":
            return Mesh(1, 1, 1)
        tensor = math.gcd(CHIPS_PER_HOST, self.head_ways)
        return Mesh(1, CHIPS_PER_HOST // tensor, tensor)

    @property
    def head_ways(self) -> int:
        """Over how many chips heads can be cut."""
        return math.gcd(self.chips, self.model.kv_heads, self.model.hidden, self.model.vocab)

    @property
    def program(self) -> Program:
        """What the hosts are given, its mesh filled."""
        return Program(
            self.model,
            self.data,
            self.filled_mesh,
            self.optim,
            self.train,
            self.eval,
            self.checkpoint,
            self.profile,
            self.guard,
            self.evaluate,
            self.serve,
        )


def check_detached(cluster: Cluster, run: Run) -> None:
    """A controller that outlives this machine needs a Ray cluster that does. Raises ConfigError."""
    require(
        cluster.kind != "local",
        "detach=true: a slice of cluster=local ends with this machine; allowed are cluster=ray, gcp and gke",
    )
    require(
        cluster.kind != "gke" or cluster.name is not None,
        "detach=true: with cluster=gke the controller lives on the head of a RayCluster that outlives the run; give"
        " cluster.name=NAME, that of launch.cluster up, and cluster.address=HOST:PORT of its head",
    )
    require(
        cluster.kind != "gcp" or cluster.address is not None,
        "detach=true: cluster=gcp starts the Ray head on this machine; give cluster.address=HOST:PORT, a head on a"
        " machine that is not preemptible",
    )
    require(
        cluster.dashboard_at is not None,
        f"cluster.address={cluster.address or 'null'}: detach=true needs HOST:PORT, or cluster.dashboard=HOST:PORT",
    )
    require(
        run.root.startswith("/"), f"run.root={run.root}: with detach=true it lies on the cluster; give an absolute path"
    )


def from_container(container: Mapping[str, Any]) -> Config:
    """The border. Raises ConfigError naming the key, what came and what is allowed."""
    config = crossed(container)
    if config.serve is not None:
        check_replicas(config)
    program = config.program
    check(program)
    slices, replica = config.cluster.num_slices, program.mesh.replica
    require(
        replica % slices == 0,
        f"mesh.replica={replica}: must be a multiple of cluster.num_slices={slices} (fsdp and tensor stay in a slice)",
    )
    faults.check(config.chaos, None if config.evaluate or config.serve else config.train.steps, config.hosts)
    return config


def check_replicas(config: Config) -> None:
    """Raises ConfigError."""
    slices, kind = config.cluster.num_slices, config.cluster.kind
    require(
        slices == 1,
        f"cluster.num_slices={slices}: a server's replica is one slice; give serve.replicas={slices} instead",
    )
    require(
        not config.scales or kind != "gke",
        "serve.replicas.max: cluster=gke asks for all slices as one object; give serve.replicas=N, a fixed number",
    )


def crossed(container: Mapping[str, Any]) -> Config:
    """The same, each section by itself: a search has yet to find a mesh and a batch that go together."""
    container = with_replicas(container)
    hints = dict(typed_keys(Config))
    by_name = tuple(f"{key}." for key, hint in hints.items() if dict[str, str] in getattr(hint, "__args__", ()))
    for key, value in flatten(container).items():
        if key.startswith(by_name):
            require(isinstance(value, str), f"{key}={value}: must be text")
            continue
        if key not in hints:
            raise ConfigError(unknown_key(key))
        as_list = getattr(hints[key], "__origin__", None) is tuple
        # What dacite lets pass: true is an int to Python, and text is a sequence.
        parts = value if isinstance(value, list) else [value]
        mistaken = any(isinstance(part, bool) for part in parts) and hints[key] is not bool
        if mistaken or as_list and not isinstance(value, list):
            raise ConfigError(f"{key}={value}: must be {describe(hints[key])}")
        if any(isinstance(part, int) and abs(part) >= LARGEST_INT for part in parts):
            raise ConfigError(f"{key}={value}: must be below 2**32")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value}: must be finite")
    try:
        config = dacite.from_dict(Config, container, dacite.Config(strict=True, cast=[tuple]))
        return replace(config, optim=resolved(config.optim, config.train.steps))
    except dacite.MissingValueError as error:
        raise ConfigError(f"{error.field_path}: missing") from error
    except dacite.WrongTypeError as error:
        allowed = describe(error.field_type)
        raise ConfigError(f"{error.field_path}={error.value}: must be {allowed}") from error


def with_replicas(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """serve.replicas=N is N at least and at most."""
    serve = container.get("serve")
    if not isinstance(serve, Mapping) or isinstance(count := serve.get("replicas", {}), Mapping):
        return container
    if not isinstance(count, int) or isinstance(count, bool):
        raise ConfigError(f"serve.replicas={count}: must be a whole number, or a section with min and max")
    fixed = {"min": count, "max": count, "up_s": 1.0, "down_s": 1.0}
    return {**container, "serve": {**serve, "replicas": fixed}}


def describe(kind: Any) -> str:
    """A type as a user would say it."""
    if is_dataclass(kind):
        return "a section"
    if hasattr(kind, "__args__"):
        parts = kind.__args__
        names = [repr(p) if isinstance(p, str) else describe(p) for p in parts if p is not ...]
        if getattr(kind, "__origin__", None) is tuple:
            return "a list of texts" if parts[0] is str else "a list of whole numbers"
        if getattr(kind, "__origin__", None) is dict:
            return "texts by name, {NAME: TEXT}"
        return "one of " + ", ".join(names) if isinstance(parts[0], str) else " or ".join(names)
    return {
        int: "a whole number",
        float: "a number",
        str: "text (a number as text: '\"123\"')",
        bool: "true or false",
        type(None): "null",
    }[kind]


def typed_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config dataclass, with its type."""
    for name, hint in get_type_hints(kind).items():
        section = next((part for part in (hint, *getattr(hint, "__args__", ())) if is_dataclass(part)), None)
        if section is not None:
            yield from typed_keys(section, f"{prefix}{name}.")  # type: ignore[arg-type]
        if section is not hint:
            yield prefix + name, hint


def flatten(container: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'steps': 3}} as {'train.steps': 3}."""
    flat: dict[str, Any] = {}
    for name, value in container.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def unknown_key(key: str) -> str:
    """One line about a key that does not exist: the nearest ones, else the section's keys."""
    known = [k for k, _ in typed_keys(Config)]
    if key in known:  # of a provider's section that this choice does not have
        return f"{key}: goes with cluster={key.split('.')[1]}"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    if near:
        return f"{key}: unknown key; did you mean {' or '.join(near)}?"
    section = [k for k in known if k.split(".")[0] == key.split(".")[0]]
    if section:
        return f"{key}: unknown key; allowed: {', '.join(section)}"
    sections = dict.fromkeys(k.split(".")[0] for k in known)
    return f"{key}: unknown key; sections are {', '.join(sections)}"


def with_id(config: Config, run_id: str, root: str) -> Config:
    return replace(config, run=replace(config.run, id=run_id, root=root))


def of_replica(config: Config, folder: Path) -> Config:
    """One replica of a server as a run of its own, in a folder of the server's."""
    assert config.serve is not None
    one = replace(config.serve, replicas=replace(config.serve.replicas, min=1, max=1))
    run = replace(config.run, id=folder.name, root=str(folder.parent))
    return replace(config, run=run, serve=one, wandb=replace(config.wandb, mode="disabled"))


def writing(config: Config) -> Config:
    """An evaluation's config as hosts have it while they write texts: each by itself, by the engine that serves."""
    assert config.evaluate is not None
    what = config.evaluate
    serve = Serve(
        checkpoint=what.weights,
        step=what.step,
        name=config.model.name,
        replicas=Replicas(1, 1, 1.0, 1.0),
        slots=what.slots,
        context=None,
        page=None,
        chunk=256,
        cache_tokens=None,
        weights="auto",
        host="127.0.0.1",
        port=0,
        prefix="",
        api_keys=None,
        cors=(),
        queue=1,
        body_mb=1.0,
        drain_s=1.0,
        follow=False,
        requests_per_minute=None,
        tokens_per_minute=None,
        filter="off",
        filter_weights=None,
        filter_threshold=0.5,
        filter_passage=1,
    )
    return replace(config, serve=serve)


def leased(config: Config) -> Config:
    """With the slices that a run begins with."""
    count = config.serve.replicas.min if config.serve else config.cluster.num_slices
    return replace(config, cluster=replace(config.cluster, num_slices=count))


def with_slices(config: Config, count: int) -> Config:
    """The same run on fewer slices, each global batch over fewer replicas. Raises ConfigError where they do not fit."""
    replica, wanted = config.mesh.replica, config.cluster.num_slices
    if replica != -1:
        require(replica * count % wanted == 0, f"mesh.replica={replica}: does not divide over {count} slices")
        replica = replica * count // wanted
    fewer = replace(
        config, cluster=replace(config.cluster, num_slices=count), mesh=replace(config.mesh, replica=replica)
    )
    check(fewer.program)
    return fewer
