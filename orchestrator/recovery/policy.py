"""What to do about a failure. Pure: the controller obeys."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.recovery.outcome import Outcome

FREE = frozenset({Outcome.PREEMPTED, Outcome.REGROWN})  # nobody's fault, and foreseen
MOST_FREE = 30  # of these without a newly committed step: slices that never stay cost money and train nothing
RETRIED = FREE | {
    *(Outcome.SLICE_LOST, Outcome.NODE_DIED, Outcome.OUT_OF_MEMORY, Outcome.HOST_CRASHED, Outcome.HOST_DIED),
    *(Outcome.HANG, Outcome.PEER_LOST, Outcome.SNAPSHOT, Outcome.CHECKPOINT, Outcome.UNFIT),
}
# Made by the program itself: where one comes back at the same step, it will come back for ever. What is done to a run
# from outside, a kill or a lost machine, may strike twice at a step by chance.
IN_FLIGHT = 1  # step: whether it was done when its successor failed is a matter of chance
OWN = frozenset({Outcome.OUT_OF_MEMORY, Outcome.HOST_CRASHED, Outcome.HANG, Outcome.PEER_LOST})


@dataclass(frozen=True)
class Failure:
    """One failure of the run's history."""

    outcome: Outcome
    signature: str  # equal for equal failures: outcome, exception, last frame
    step: int  # the newest step done before it
    committed: int | None  # the newest step that could be gone back to then, in memory or on disk
    left: int = 0  # checkpoints, once an unreadable one was set aside


@dataclass(frozen=True)
class Restart:
    reason: str


@dataclass(frozen=True)
class GiveUp:
    reason: str


def decide(history: Sequence[Failure], budget: int) -> Restart | GiveUp:
    """history: every failure of this run, the newest last. The budget counts those since the last new commit."""
    last = history[-1]
    name = last.outcome.value
    if last.outcome not in RETRIED:
        return GiveUp(f"{name}: trying again would fail again")
    if last.outcome is Outcome.CHECKPOINT:
        return decide_unreadable(history)
    counted = [failure for failure in history if (failure.outcome in FREE) == (last.outcome in FREE)]
    spent = sum(failure.committed == last.committed for failure in counted)
    if last.outcome in FREE:
        if spent > MOST_FREE:
            return GiveUp(f"{name}: {spent} times without a newly committed step; {MOST_FREE} are allowed")
        return Restart(f"{name}; not counted as a failure")
    if len(counted) > 1 and last.outcome in OWN:
        before = counted[-2]
        if before.signature == last.signature and abs(before.step - last.step) <= IN_FLIGHT:
            return GiveUp(f"{name}: twice the same at step {last.step}")
    if spent > budget:
        return GiveUp(f"{spent} failures without a newly committed step; retry.budget={budget}")
    return Restart(f"{name}; {spent} of retry.budget={budget} since the last newly committed step")


def decide_unreadable(history: Sequence[Failure]) -> Restart | GiveUp:
    """For an unreadable checkpoint. Each one set aside must leave fewer, or retrying would never end."""
    last = history[-1]
    name = last.outcome.value
    if last.left == 0:
        return GiveUp(f"{name}, and there is no older one; the run does not start from step 0 by itself")
    before = [failure for failure in history[:-1] if failure.outcome is Outcome.CHECKPOINT]
    if before and before[-1].left <= last.left and before[-1].step == last.step:
        return GiveUp(f"{name}: setting it aside does not help, {last.left} are left as before")
    return Restart(f"{name}; the one before is used")
