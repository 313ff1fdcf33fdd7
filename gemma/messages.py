"""Messages from a host to its controller: plain values, no arrays, no JAX."""

from dataclasses import dataclass, field

from gemma.batching.plans import Limits


@dataclass(frozen=True)
class Restored:
    """A host stands ready at `step`."""

    step: int
    fresh: bool  # initialised, not restored
    fingerprint: str  # of the tokens: all hosts must agree
    bytes_per_target: float
    step_flops: int
    compile_cached: bool
    platform: str
    seconds: dict[str, float]  # by phase: data, compile, restore
    steps: int  # the last one of the run; an evaluation's are its batches
    eval_fingerprints: dict[str, str]  # of the tokens of each of eval.sets: all hosts must agree
    warnings: tuple[str, ...]  # for the user, about the text: one line each
    sets: dict[str, int] = field(default_factory=dict)  # of an evaluation: how many of its batches each set has
    rows: tuple["Row", ...] = ()  # of steps before `step` whose results may not have reached the controller
    evals: tuple["Evaluated", ...] = ()  # likewise
    limits: tuple[Limits, ...] = ()  # of a server: compiled shapes and cache of the model served, and of its judge


@dataclass(frozen=True)
class Row:
    """One step's scalars; `step` counts the steps done, this one included."""

    step: int
    metrics: dict[str, float]
    step_s: float
    time: float  # time.time() at which the step was seen done


@dataclass(frozen=True)
class Evaluated:
    """Mean loss in nats of each held-out set after `step` steps, and the seconds it took."""

    step: int
    sets: tuple[tuple[str, float, float], ...]  # name, loss, targets; first the run's own split
    seconds: float


@dataclass(frozen=True)
class Scores:
    """A block's answers, in the order of its requests: the log-probability of all targets in nats, and whether each
    was the most likely token.
    """

    block: int
    found: tuple[tuple[float, bool], ...]


@dataclass(frozen=True)
class BadStep:
    """A step whose update was not applied: not finite, or a spike."""

    step: int  # counted as Row counts
    places: tuple[tuple[int, int], ...]  # of its rows in the order of training, each first..end-1: gemma.text.order
    ids: tuple[int, ...]  # the same rows by their number in the corpus


@dataclass(frozen=True)
class WindowResult:
    """The results of a window of steps."""

    rows: tuple[Row, ...]
    bad: tuple[BadStep, ...]
    halted: bool  # the hosts refuse further steps until a `restore`
    snapshots: int  # taken in this window
    wait_s: float  # the devices were idle, waiting for snapshots
    data_s: float  # the devices were idle, waiting for the next batch


@dataclass(frozen=True)
class SnapshotsBegun:
    """A host's snapshots have begun."""

    pack_s: float  # the devices' time for one snapshot
    seconds: float  # training stood still


@dataclass(frozen=True)
class SaveBegun:
    """A save has begun, or not."""

    seconds: float  # training stood still
    problem: str | None  # nothing is written: which host found what in the way


@dataclass(frozen=True)
class SaveFailed:
    """A save that had begun has failed."""

    step: int
    problem: str


@dataclass(frozen=True)
class Opened:
    """A host's programs are ready; how much of its memory snapshots will take."""

    share_key: str  # equal for hosts that hold the same bytes of the state
    share_bytes: int


@dataclass(frozen=True)
class ChipFacts:
    """A host's facts about its chips. Per-chip facts are tuples, in device order."""

    platform: str
    chips: int
    chips_in_all: int  # of all hosts, as this host sees it
    free_bytes: tuple[int, ...] = ()  # empty where the platform does not report it
    products: tuple[str, ...] = ()  # checksums of one and the same matrix product
    seconds: tuple[float, ...] = ()  # that the product took; empty where the time means nothing
