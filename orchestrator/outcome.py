"""What a failure was, by evidence: who died, what was raised, which deadline passed. Never by words in a message."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Evidence:
    """What is known of one host after a failure."""

    rank: int
    died: bool = False  # its process is gone
    node_alive: bool = True
    exception: str | None = None  # the type that was raised inside it
    message: str = ""
    traceback: str = ""
    overdue: str | None = None  # what it did not finish in time


class Outcome(Enum):
    HOST_DIED = "host died"  # the process is gone, its node lives
    NODE_DIED = "node died"
    HANG = "hang"
    PEER_LOST = "peer lost"  # the collectives broke, nobody was seen to die
    BAD_INPUT = "bad input"  # the user's mistake, seen on a host
    CHECKPOINT = "checkpoint unreadable"
    SNAPSHOT = "snapshot gone"  # a second host died while the state was being read from its memory
    ERROR = "error"  # an exception in the program


# Raised by the runtime when a peer is gone or the network is: the type says so, whatever its text.
COLLECTIVE_ERRORS = frozenset({"JaxRuntimeError", "XlaRuntimeError"})


def classify(evidence: Sequence[Evidence]) -> tuple[Outcome, Evidence]:
    """The outcome and the host it is read from. A death explains its peers' exceptions, so it is looked for first."""
    for item in evidence:
        if not item.node_alive:
            return Outcome.NODE_DIED, item
    for item in evidence:
        if item.died:
            return Outcome.HOST_DIED, item
    raised = [item for item in evidence if item.exception]
    for item in raised:
        if item.exception == "ConfigError":
            return Outcome.BAD_INPUT, item
        if item.exception == "CheckpointError":
            return Outcome.CHECKPOINT, item
        if item.exception == "SnapshotError":
            return Outcome.SNAPSHOT, item
    for item in raised:
        if item.exception not in COLLECTIVE_ERRORS:
            return Outcome.ERROR, item
    if raised:
        # Out of memory has the same type as a broken collective, but strikes every host and is no network's fault.
        exhausted = [item for item in raised if item.message.startswith("RESOURCE_EXHAUSTED")]
        return (Outcome.ERROR, exhausted[0]) if exhausted else (Outcome.PEER_LOST, raised[0])
    for item in evidence:
        if item.overdue:
            return Outcome.HANG, item
    return Outcome.ERROR, evidence[0]
