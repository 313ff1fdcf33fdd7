"""What a failure was, by evidence: who died and how, which exception type, which deadline passed."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Evidence:
    """What is known of one host after a failure."""

    rank: int
    died: bool = False  # its process is gone
    node_alive: bool = True
    slice_alive: bool = True  # some host of its slice lives
    notice: str | None = None  # that its machine would be taken away: SIGTERM, a drain, the metadata server
    crash: str = ""  # what the process wrote as it crashed: a segmentation fault, an abort
    out_of_memory: bool = False  # the kernel, or Ray, has killed for memory on this host meanwhile
    unfit: str = ""  # what is wrong with its chips, seen before they trained
    exception: str | None = None  # the type that was raised inside it
    message: str = ""
    traceback: str = ""
    overdue: str | None = None  # what it did not finish in time
    stopped: bool = False  # its process is there, but does not run
    time: float = 0.0  # time.time() at which it died or raised; 0 where nobody saw


class Outcome(Enum):
    PREEMPTED = "preempted"  # somebody said that the machine would go
    REGROWN = "slice back"  # no failure: the run takes up a slice that it had lost
    UNFIT = "unfit host"  # its chips are too few, taken, wrong or slow
    SLICE_LOST = "slice lost"  # every host of a slice is gone
    NODE_DIED = "node died"
    OUT_OF_MEMORY = "out of memory"  # of the host
    HOST_CRASHED = "host crashed"  # the process ended itself: a segmentation fault, an abort
    HOST_DIED = "host died"  # the process was ended from outside, its node lives
    HANG = "hang"
    PEER_LOST = "peer lost"  # the collectives broke, nobody was seen to die
    BAD_INPUT = "bad input"  # the user's mistake, seen on a host
    CHECKPOINT = "checkpoint unreadable"
    LOST = "checkpoint gone"  # that was committed: nothing to set aside, and no step to start from
    SNAPSHOT = "snapshot unusable"  # damaged, or a second host died while the state was being read from its memory
    DIVERGED = "diverged"  # updates that are not finite or spike, more than the guard allows
    ERROR = "error"  # an exception in the program


# Raised by the runtime when a peer is gone or the network is: the type says so, whatever its text.
COLLECTIVE_ERRORS = frozenset({"JaxRuntimeError", "XlaRuntimeError"})
NAMED = {
    "ConfigError": Outcome.BAD_INPUT,
    "WeightsError": Outcome.BAD_INPUT,
    "CheckpointError": Outcome.CHECKPOINT,
    "LostError": Outcome.LOST,
    "SnapshotError": Outcome.SNAPSHOT,
    "Diverged": Outcome.DIVERGED,
}


def classify(evidence: Sequence[Evidence]) -> tuple[Outcome, Evidence]:
    """The outcome and the host it is read from. A death explains its peers' exceptions, so it is looked for first."""
    for item in evidence:
        if item.unfit:
            return Outcome.UNFIT, item
    dead = sorted((item for item in evidence if item.died or not item.node_alive), key=when)
    for item in evidence:
        if item.notice:
            return Outcome.PREEMPTED, item
    if found := classify_deaths(dead):
        return found
    raised = sorted((item for item in evidence if item.exception), key=when)
    if raised:
        return classify_exceptions(raised)
    overdue = [item for item in evidence if item.overdue]
    if overdue:
        return Outcome.HANG, next((item for item in overdue if item.stopped), overdue[0])
    return Outcome.ERROR, evidence[0]


def when(item: Evidence) -> float:
    """The first to fail comes first; unseen times come last."""
    return item.time or float("inf")


def classify_deaths(dead: Sequence[Evidence]) -> tuple[Outcome, Evidence] | None:
    """The largest thing that is gone; of processes, one that says why."""
    for outcome, found in (
        (Outcome.SLICE_LOST, [item for item in dead if not item.slice_alive]),
        (Outcome.NODE_DIED, [item for item in dead if not item.node_alive]),
        (Outcome.OUT_OF_MEMORY, [item for item in dead if item.out_of_memory]),
        (Outcome.HOST_CRASHED, [item for item in dead[:1] if item.crash]),
        (Outcome.HOST_DIED, [item for item in dead if not item.crash]),
        (Outcome.HOST_CRASHED, list(dead)),
    ):
        if found:
            return outcome, found[0]
    return None


def classify_exceptions(raised: Sequence[Evidence]) -> tuple[Outcome, Evidence]:
    for item in raised:
        if item.exception in NAMED:
            return NAMED[item.exception], item
    for item in raised:
        if item.exception not in COLLECTIVE_ERRORS:
            return Outcome.ERROR, item
    # Out of memory has the same type as a broken collective, but strikes every host and is no network's fault.
    exhausted = [item for item in raised if item.message.startswith("RESOURCE_EXHAUSTED")]
    return (Outcome.ERROR, exhausted[0]) if exhausted else (Outcome.PEER_LOST, raised[0])
