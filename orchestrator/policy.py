"""What to do about a failure. Pure: the controller obeys."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.outcome import Outcome

RETRIED = frozenset({Outcome.HOST_DIED, Outcome.NODE_DIED, Outcome.HANG, Outcome.PEER_LOST, Outcome.SNAPSHOT})


@dataclass(frozen=True)
class Failure:
    """One failure of the run's history."""

    outcome: Outcome
    signature: str  # equal for equal failures: outcome, exception, last frame
    step: int  # the newest step reported before it
    committed: int | None  # the newest checkpoint then


@dataclass(frozen=True)
class Restart:
    reason: str


@dataclass(frozen=True)
class GiveUp:
    reason: str


def decide(history: Sequence[Failure], budget: int) -> Restart | GiveUp:
    """history: every failure of this run, the newest last. The budget counts those since the last new commit."""
    last = history[-1]
    if last.outcome not in RETRIED:
        return GiveUp(f"{last.outcome.value}: trying again would fail again")
    if len(history) > 1 and last.outcome is Outcome.PEER_LOST:
        before = history[-2]
        if (before.signature, before.step) == (last.signature, last.step):
            return GiveUp(f"{last.outcome.value}: twice the same at step {last.step}")
    spent = sum(failure.committed == last.committed for failure in history)
    if spent > budget:
        return GiveUp(f"{spent} failures without a new checkpoint; retry.budget={budget}")
    return Restart(f"{last.outcome.value}; {spent} of retry.budget={budget} since the last checkpoint")
