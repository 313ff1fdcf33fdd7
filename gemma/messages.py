"""What a host tells its controller: plain values, no arrays, no JAX."""

from dataclasses import dataclass


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
    eval_fingerprints: dict[str, str]  # of the tokens of each of eval.sets: all hosts must agree
    warnings: tuple[str, ...]  # for the user, about the text: one line each
    rows: tuple["Row", ...] = ()  # of steps before `step` that the controller may not have been told of
    evals: tuple["Evaluated", ...] = ()  # likewise


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
class Bad:
    """A step whose update was not applied: not finite, or a spike."""

    step: int  # counted as Row counts
    places: tuple[tuple[int, int], ...]  # of its rows in the order of training, each first..end-1: gemma.text.order
    ids: tuple[int, ...]  # the same rows by their number in the corpus


@dataclass(frozen=True)
class Ran:
    """What a window of steps brought."""

    rows: tuple[Row, ...]
    bad: tuple[Bad, ...]
    halted: bool  # the hosts make no step more before they are brought back to one
    snapshots: int  # taken meanwhile
    wait_s: float  # for them while the devices had nothing to do
    data_s: float  # that the devices stood still for the next batch


@dataclass(frozen=True)
class Kept:
    """A host's snapshots have begun."""

    pack_s: float  # that its devices take for one
    seconds: float  # that training stood still


@dataclass(frozen=True)
class Saved:
    """A save has begun, or not."""

    seconds: float  # training stood still
    problem: str | None  # nothing is written: which host found what in the way


@dataclass(frozen=True)
class Failed:
    """A save that had begun has failed."""

    step: int
    problem: str


@dataclass(frozen=True)
class Opened:
    """A host's programs are ready; what its memory will have to hold."""

    share_key: str  # equal for hosts that hold the same bytes of the state
    share_bytes: int


@dataclass(frozen=True)
class ChipFacts:
    """What a host has found out about its chips; of each, in their order, what is a tuple."""

    platform: str
    chips: int
    chips_in_all: int  # of all hosts, as this one sees it
    free_bytes: tuple[int, ...] = ()  # empty where the platform does not tell
    products: tuple[str, ...] = ()  # a checksum of the same matrix product
    seconds: tuple[float, ...] = ()  # that it took; empty where that tells nothing
