"""What a training program is made of: frozen values, no defaults (they live in conf/), no JAX.

Contradictions inside one section are refused on construction; what needs two sections is refused by `check`.
Every refusal is a `ConfigError` whose text is one line: the key, what came, what is allowed.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

OWN_SPLIT = "held_out"  # the evaluation set that is the run's own held-out split


class ConfigError(ValueError):
    """The user's mistake, told in one line."""


def require(ok: bool, message: str) -> None:
    """Raises ConfigError(message) unless ok."""
    if not ok:
        raise ConfigError(message)


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """What the system says of a path that the user gave becomes a ConfigError that begins with `setting`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # a path with a null byte; ~user who does not exist
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{setting}: {getattr(error, 'strerror', None) or error}") from error


def require_local(key: str, path: str | None) -> None:
    """Raises ConfigError where a path is a URL, or of a user who does not exist."""
    if path is None:
        return
    require(
        not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", path),
        f"{key}={path}: is a URL; allowed is a path of the file system: mount the bucket, for instance by gcsfuse",
    )
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key}={path}: there is no such user") from None


def require_at_least(section: str, values: dict[str, int | float], least: int | float) -> None:
    for key, value in values.items():
        require(value >= least, f"{section}.{key}={value}: must be at least {least}")


MOST_LAYERS, MOST_SIZE = 1000, 2**31 - 1


@dataclass(frozen=True)
class Model:
    """Gemma 2's shape; the numbers of 2B, 9B and 27B are the report's table 1 (arXiv:2408.00118)."""

    name: str
    vocab: int  # embedding rows; at least the tokenizer's ids
    width: int
    layers: int  # even: local and global alternate, scanned in pairs
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    window: int  # a local layer's query sees itself and window-1 tokens before it
    attention_cap: float
    final_cap: float
    query_scale: float  # multiplies q before the dot product
    context: int
    rope_base: float
    norm_eps: float

    def __post_init__(self) -> None:
        sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_size", "hidden", "window", "context")
        require_at_least("model", {key: getattr(self, key) for key in sizes}, 1)
        for key in sizes:  # also of weights that others have written: nothing is sized by a number without bound
            value, most = getattr(self, key), MOST_LAYERS if key == "layers" else MOST_SIZE
            came = value if value < 10**15 else "a number of more than 15 digits"
            require(value <= most, f"model.{key}={came}: must be at most {most}")
        require(self.layers % 2 == 0, f"model.layers={self.layers}: must be even (local and global layers alternate)")
        require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads}: must divide model.heads={self.heads}",
        )
        require(self.head_size % 2 == 0, f"model.head_size={self.head_size}: must be even (rotary halves)")
        for key in ("attention_cap", "final_cap", "query_scale", "rope_base", "norm_eps"):
            good = 0 < getattr(self, key) < math.inf
            require(good, f"model.{key}={getattr(self, key)}: must be above 0, and finite")


@dataclass(frozen=True)
class Data:
    source: Literal["stdlib", "text"]
    path: str | None  # file, directory or glob; .txt .md .rst .py, .jsonl .ndjson, each also as .gz
    text_key: str  # the field of a jsonl line that holds the text
    tokenizer: str  # "byte", or the path of a SentencePiece model
    sequence: int
    eval_fraction: float  # of the documents, chosen by content hash, held out from training
    max_document_mb: float  # 1e6 bytes, unpacked; a larger document is refused

    def __post_init__(self) -> None:
        require_at_least("data", {"sequence": self.sequence}, 2)
        require_local("data.path", self.path)
        require_local("data.tokenizer", self.tokenizer)
        require(
            0 <= self.eval_fraction < 0.5,
            f"data.eval_fraction={self.eval_fraction}: must lie between 0 and 0.5",
        )
        require(
            0 < self.max_document_mb <= 1e6,
            f"data.max_document_mb={self.max_document_mb}: must be above 0 and at most 1e6",
        )
        if self.source == "text":
            require(bool(self.path), "data.path: missing; data=text needs a file or directory, data.path=PATH")
        else:
            require(self.path is None, f"data.path={self.path}: only data=text takes a path")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 fills. `replica` crosses slices, `fsdp` and `tensor` stay inside one."""

    replica: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        for key in ("replica", "fsdp", "tensor"):
            value = getattr(self, key)
            require(value == -1 or value >= 1, f"mesh.{key}={value}: must be -1 (fill) or at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.replica, self.fsdp, self.tensor)

    @property
    def batch_shards(self) -> int:
        return self.replica * self.fsdp


@dataclass(frozen=True)
class Optim:
    lr: float
    schedule: Literal["cosine", "linear", "wsd", "constant"]
    warmup_steps: int
    decay_steps: (
        int | None
    )  # the step, warm-up and all, from which the rate stays final; null: train.steps at the start
    wsd_decay_steps: int | None  # of wsd, the last so many steps before decay_steps decay; 0 never, null: a tenth
    final_lr_ratio: float  # the schedule ends at lr * final_lr_ratio
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # never on norms
    clip_norm: float | None

    def __post_init__(self) -> None:
        for key in ("lr", "eps"):
            require(0 < getattr(self, key) <= 10, f"optim.{key}={getattr(self, key)}: must be above 0, and at most 10")
        require_at_least("optim", {"warmup_steps": self.warmup_steps, "weight_decay": self.weight_decay}, 0)
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"optim.{key}={getattr(self, key)}: must be at least 0 and below 1")
        decay, wsd, warmup = self.decay_steps, self.wsd_decay_steps, self.warmup_steps
        require(warmup < 2**31 - 1, f"optim.warmup_steps={warmup}: must be below 2**31 - 1")
        require(
            decay is None or warmup < decay < 2**31,
            f"optim.decay_steps={decay}: must be above optim.warmup_steps={warmup} and below 2**31, or null",
        )
        most = 2**31 - 1 if decay is None else decay - warmup
        require(
            wsd is None or 0 <= wsd <= most,
            f"optim.wsd_decay_steps={wsd}: must lie in 0..{most} (optim.decay_steps - optim.warmup_steps), or be null",
        )
        require(0 <= self.final_lr_ratio <= 1, f"optim.final_lr_ratio={self.final_lr_ratio}: must lie in 0..1")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm={self.clip_norm}: must be above 0, or null for no clipping",
        )


@dataclass(frozen=True)
class Train:
    steps: int
    tokens: float | None  # of the whole training, for the plan to cost
    batch: int  # sequences a step, over all chips
    seed: int
    dtype: Literal["float32", "bfloat16"]  # compute; master weights are float32
    accumulation: int  # microbatches a step
    remat: Literal["none", "dots", "narrow", "full"]  # what the backward pass finds again
    loss_chunk: int  # target positions whose logits exist at a time
    init_from: str | None  # weights to start from: an imported checkpoint, a Hugging Face folder, another run
    reduce_dtype: Literal["auto", "float32", "bfloat16"]  # of gradients, where they are summed over `fsdp`

    def __post_init__(self) -> None:
        sizes = ("steps", "batch", "accumulation", "loss_chunk")
        require_at_least("train", {key: getattr(self, key) for key in sizes}, 1)
        require_local("train.init_from", self.init_from)
        require(0 <= self.seed < 2**32, f"train.seed={self.seed}: must be at least 0 and below 2**32")
        require(self.tokens is None or self.tokens > 0, f"train.tokens={self.tokens}: must be above 0, or null")
        require(self.steps < 2**31, f"train.steps={self.steps}: must be below 2**31")
        require(
            self.batch % self.accumulation == 0,
            f"train.accumulation={self.accumulation}: must divide train.batch={self.batch}",
        )

    @property
    def gradients_in(self) -> str:
        """The dtype in which gradients are summed over `fsdp`. auto is that of the computation."""
        return self.dtype if self.reduce_dtype == "auto" else self.reduce_dtype


@dataclass(frozen=True)
class Eval:
    every: int  # steps; 0 is off
    rows: int  # of each set, at most; the same ones whatever train.batch and the mesh are
    sets: dict[str, str] | None  # name: path, read as data.path is; beside the run's own held-out split
    tasks: tuple[str, ...]  # rows of the model card that are answered by choosing, asked every so many steps too
    limit: int | None  # documents of each part of them; null is all
    data: str | None  # a folder with the benchmarks' files; null takes them from the Hugging Face hub

    def __post_init__(self) -> None:
        require_at_least("eval", {"every": self.every}, 0)
        require_at_least("eval", {"rows": self.rows}, 1)
        require(self.limit is None or self.limit >= 1, f"eval.limit={self.limit}: must be at least 1, or null")
        require_local("eval.data", self.data or "")
        require(not self.tasks or self.every > 0, "eval.tasks: are asked every eval.every steps, which is 0")
        for name, path in (self.sets or {}).items():
            require(
                bool(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)) and name != OWN_SPLIT,
                f"eval.sets.{name}: must be named by letters, digits, '-' and '_', at most 64, and not {OWN_SPLIT}",
            )
            require(bool(path), f"eval.sets.{name}=: empty; give a file, a directory or a glob")
            require_local(f"eval.sets.{name}", path)


@dataclass(frozen=True)
class Checkpoint:
    every: int  # steps; 0 is off. The last step is always saved
    every_minutes: float  # 0 is off
    keep_last: int
    keep_every: int  # keep every step as well that is divisible by this; 0 is off
    snapshot: Literal["auto", "off"] | int  # to host memory: auto is as often as snapshot_cost allows; or each N steps
    snapshot_cost: float  # share of training time
    memory_idle_s: float  # without a controller, the memory is given up after so long

    def __post_init__(self) -> None:
        if isinstance(self.snapshot, int):
            require_at_least("checkpoint", {"snapshot": self.snapshot}, 1)
        require(
            0 < self.snapshot_cost <= 1,
            f"checkpoint.snapshot_cost={self.snapshot_cost}: must be above 0 and at most 1",
        )
        require_at_least("checkpoint", {"memory_idle_s": self.memory_idle_s}, 10)
        values = {"every": self.every, "every_minutes": self.every_minutes, "keep_every": self.keep_every}
        require_at_least("checkpoint", values, 0)
        require_at_least("checkpoint", {"keep_last": self.keep_last}, 1)


@dataclass(frozen=True)
class Profile:
    steps: tuple[int, ...]  # [] is off; [first, last] traces the steps first..last-1

    def __post_init__(self) -> None:
        pair = len(self.steps) == 2 and 0 <= self.steps[0] < self.steps[1]
        require(
            not self.steps or pair,
            f"profile.steps={list(self.steps)}: must be [] or [first,last] with 0 <= first < last",
        )


@dataclass(frozen=True)
class Guard:
    """Of updates that are not finite or spike. None is ever applied; `action` is what is done besides."""

    action: Literal["skip", "rollback", "stop"]
    spike_sigmas: float  # 0 is off; further above its running mean, in standard deviations, a loss or gradient spikes
    warmup: int  # good steps before spikes are looked for
    rollback_steps: int  # rollback goes back so many steps at least
    budget: int  # bad steps among the last 100; one more stops the run, whatever the action

    def __post_init__(self) -> None:
        require(
            0 <= self.spike_sigmas < math.inf,
            f"guard.spike_sigmas={self.spike_sigmas}: must be at least 0, and finite; 0 is off",
        )
        require_at_least("guard", {"rollback_steps": self.rollback_steps}, 1)
        require(
            2 <= self.warmup <= 2**24,
            f"guard.warmup={self.warmup}: must lie in 2..2**24 (one step has no deviation)",
        )
        require(
            0 <= self.budget <= 100,
            f"guard.budget={self.budget}: must lie in 0..100 (bad steps among the last 100)",
        )


@dataclass(frozen=True)
class Evaluate:
    """Weights that are evaluated, as a run of its own. Without suite and tasks it finds the held-out loss."""

    weights: str  # a run's folder, imported weights, a Hugging Face folder
    step: int | None  # of a run's checkpoints; null is the newest, or weights that have none
    suite: str | None  # tables of the model card: orchestrator/evaluation/tasks.py says which there are
    tasks: tuple[str, ...]  # rows of them by name, beside the suite's or without one
    data: str | None  # a folder with the benchmarks' files; null takes them from the Hugging Face hub
    limit: int | None  # documents of each part of a row; null is all
    chat: bool  # questions are put as a conversation; examples are turns of it
    contamination: bool  # whether the training text is searched for the questions
    run_code: bool  # whether programs that the model writes are run, in a sandbox
    block: int  # tokens that a device computes at a time; results may differ in the last bits with it
    slots: int  # texts that are written together

    def __post_init__(self) -> None:
        require(bool(self.weights), "evaluate.weights=: empty; give a folder")
        for key in ("weights", "data"):
            require_local(f"evaluate.{key}", getattr(self, key) or "")
        require(self.step is None or self.step >= 0, f"evaluate.step={self.step}: must be at least 0, or null")
        require(self.limit is None or self.limit >= 1, f"evaluate.limit={self.limit}: must be at least 1, or null")
        require_at_least("evaluate", {"block": self.block, "slots": self.slots}, 1)

    @property
    def asks(self) -> bool:
        """Whether requests are put, of a suite or of tasks."""
        return bool(self.suite or self.tasks)


@dataclass(frozen=True)
class Replicas:
    """How many slices serve the same weights, each by itself."""

    min: int
    max: int
    up_s: float  # requests have waited for so long: one more
    down_s: float  # one fewer would have done for so long: one fewer

    def __post_init__(self) -> None:
        require_at_least("serve.replicas", {"min": self.min, "max": self.max}, 1)
        require(
            self.min <= self.max <= 1024,
            f"serve.replicas.max={self.max}: must lie in serve.replicas.min={self.min}..1024",
        )
        for key in ("up_s", "down_s"):
            require(getattr(self, key) > 0, f"serve.replicas.{key}={getattr(self, key)}: must be above 0")


@dataclass(frozen=True)
class Serve:
    """Weights that are served: a server is a run of its own."""

    checkpoint: str  # a run's folder, imported weights, a Hugging Face folder
    step: int | None  # of a run's checkpoints; null is the newest, or weights that have none
    name: str  # what clients call the model
    replicas: Replicas
    slots: int  # sequences that decode together
    context: int | None  # positions of a sequence, at most; null is the model's
    page: int | None  # positions of a page of the cache; null is 32, on TPU 128
    chunk: int  # tokens of a prompt that are computed at a time, beside decoding
    cache_tokens: int | None  # positions that the cache holds, over all sequences; null is what memory has room for
    weights: Literal["auto", "float32", "bfloat16", "int8"]  # auto: bfloat16 on TPU, float32 elsewhere
    host: str  # where HTTP is served
    port: int  # 0 is any that is free: the screen and events.jsonl say which
    prefix: str  # before /chat/completions, beside /v1
    api_keys: str | None  # a file with a key a line; null asks for none
    cors: tuple[str, ...]  # origins whose pages may ask, as in https://example.org; * is all
    queue: int  # requests that run or wait; more are refused with 429
    body_mb: float  # of a request
    drain_s: float  # at the end, for what runs
    follow: bool  # whether newer checkpoints of the run are moved to as they come
    requests_per_minute: int | None  # of a key, or of all clients where none is asked for; more get 429. Null: any
    tokens_per_minute: int | None  # of prompts and answers, likewise
    filter: Literal["off", "words", "shieldgemma"]  # who judges prompts and answers
    filter_weights: str | None  # of shieldgemma: a folder as those that are served
    filter_threshold: float  # of shieldgemma: the probability of Yes from which on a policy counts as broken
    filter_passage: int  # characters of an answer that are judged together before they are sent

    def __post_init__(self) -> None:
        for key in ("checkpoint", "api_keys", "filter_weights"):
            require_local(f"serve.{key}", getattr(self, key) or "")
        require(bool(self.name), "serve.name=: empty; give what clients call the model")
        counts = {key: getattr(self, key) for key in ("slots", "chunk", "queue")}
        require_at_least("serve", counts, 1)
        require(self.slots <= 4096, f"serve.slots={self.slots}: must be at most 4096")
        for key in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"serve.{key}={value}: must be at least 1, or null")
        page = self.page
        require(page is None or 1 <= page <= 1024, f"serve.page={page}: must lie in 1..1024, or be null")
        for key in ("context", "cache_tokens"):
            value = getattr(self, key)
            require(value is None or value >= (page or 1), f"serve.{key}={value}: must be at least serve.page, or null")
        require(0 <= self.port < 2**16, f"serve.port={self.port}: must lie in 0..65535")
        require(
            self.prefix == "" or self.prefix.startswith("/") and not self.prefix.endswith("/"),
            f"serve.prefix={self.prefix}: must begin with / and not end with it",
        )
        require(
            self.host in ("127.0.0.1", "localhost", "::1") or self.api_keys is not None,
            f"serve.host={self.host}: reachable from elsewhere, so it needs serve.api_keys=FILE, a key a line",
        )
        judged, weights = self.filter == "shieldgemma", self.filter_weights
        require(
            judged == (weights is not None),
            f"serve.filter={self.filter} serve.filter_weights={weights}: "
            + ("needs serve.filter_weights=FOLDER" if judged else "only serve.filter=shieldgemma takes weights"),
        )
        require(
            0 < self.filter_threshold < 1,
            f"serve.filter_threshold={self.filter_threshold}: must lie between 0 and 1",
        )
        require(
            1 <= self.filter_passage <= 10**6, f"serve.filter_passage={self.filter_passage}: must lie in 1..1000000"
        )
        require(0 < self.body_mb <= 1024, f"serve.body_mb={self.body_mb}: must lie in 0..1024")
        require(0 < self.drain_s < 1e9, f"serve.drain_s={self.drain_s}: must be above 0 and below 1e9 seconds")


@dataclass(frozen=True)
class Program:
    """All that the SPMD program needs to know. Equal programs train the same model, bit for bit, on equal meshes."""

    model: Model
    data: Data
    mesh: Mesh
    optim: Optim
    train: Train
    eval: Eval
    checkpoint: Checkpoint
    profile: Profile
    guard: Guard
    evaluate: Evaluate | None  # null trains, or serves
    serve: Serve | None  # null trains, or evaluates


def fill(mesh: Mesh, chips: int) -> Mesh:
    """The mesh with its -1 replaced, so that its product is the number of chips. At most one -1 is allowed."""
    shown = f"mesh.replica={mesh.replica} mesh.fsdp={mesh.fsdp} mesh.tensor={mesh.tensor}"
    free = [key for key in ("replica", "fsdp", "tensor") if getattr(mesh, key) == -1]
    require(len(free) <= 1, f"{shown}: only one axis may be -1")
    known = math.prod(size for size in mesh.shape if size != -1)
    if free:
        fits = chips % known == 0
        require(fits, f"{shown}: {known} does not divide the {chips} chips; what is given must divide {chips}")
        return replace(mesh, **{free[0]: chips // known})
    if known != chips:
        near = [f"mesh.fsdp={chips // rest}" for rest in [mesh.replica * mesh.tensor] if chips % rest == 0]
        hint = near[0] if near else f"mesh.replica=1 mesh.fsdp={chips} mesh.tensor=1"
        raise ConfigError(f"{shown}: makes {known} chips, the cluster has {chips}; what would fit: {hint}")
    return mesh


def check(program: Program) -> None:
    """Refuses what contradicts itself across sections. The mesh must be filled."""
    model, data, mesh, train = program.model, program.data, program.mesh, program.train
    for key, size, name in (
        ("fsdp", model.width, "model.width"),
        ("tensor", model.kv_heads, "model.kv_heads"),
        ("tensor", model.hidden, "model.hidden"),
        ("tensor", model.vocab, "model.vocab"),
    ):
        ways = getattr(mesh, key)
        allowed = [n for n in range(1, min(size, 8192) + 1) if size % n == 0]
        require(ways in allowed, f"mesh.{key}={ways}: must divide {name}={size}; allowed: {allowed}")
    if data.tokenizer == "byte":
        require(model.vocab >= 260, f"model.vocab={model.vocab}: the byte tokenizer needs at least 260")
    if program.serve is not None:
        require(mesh.replica == 1, f"mesh.replica={mesh.replica}: a server has one copy of the weights; must be 1")
        return
    if program.evaluate is not None and program.evaluate.asks:
        return  # neither text nor batches are of interest
    rows = mesh.batch_shards * train.accumulation
    require(
        train.batch % rows == 0,
        f"train.batch={train.batch}: must be a multiple of {rows} (mesh.replica x mesh.fsdp x train.accumulation"
        f" = {mesh.replica} x {mesh.fsdp} x {train.accumulation})",
    )
    require(
        data.sequence <= model.context,
        f"data.sequence={data.sequence}: {model.name} was made for at most {model.context} (model.context)",
    )
    require(data.eval_fraction > 0, f"data.eval_fraction={data.eval_fraction}: must lie between 0 and 0.5")
    if program.profile.steps:
        first = program.profile.steps[0]
        require(
            first < train.steps, f"profile.steps={list(program.profile.steps)}: begins after train.steps={train.steps}"
        )
