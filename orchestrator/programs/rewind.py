"""What to do about bad steps: updates that are not finite, or spike. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from gemma.config import Guard
from gemma.messages import BadStep

RECENT = 100  # steps, among which the guard's budget counts


@dataclass(frozen=True)
class GoBack:
    """Back to this step or before; without the batch if it is to blame."""

    step: int
    without_batch: bool


@dataclass(frozen=True)
class Stop:
    reason: str


def since_last_good(bad: Sequence[BadStep]) -> BadStep:
    """The first of the consecutive bad steps at the end of the list (oldest first)."""
    first = bad[-1]
    for one in reversed(bad[:-1]):
        if one.step != first.step - 1:
            break
        first = one
    return first


def over_budget(guard: Guard, bad_steps: Sequence[int]) -> Stop | None:
    """Whether the last RECENT steps up to the newest bad one hold more bad steps than guard.budget, whatever is done
    about each. bad_steps: every bad step of the run, in the order they came.
    """
    newest = bad_steps[-1]
    recent = [step for step in bad_steps if newest - RECENT < step <= newest]
    if len(recent) <= guard.budget:
        return None
    return Stop(f"{len(recent)} bad steps among the last {RECENT}, up to step {newest}: guard.budget={guard.budget}")


def decide_rewind(guard: Guard, bad: BadStep, bad_steps: Sequence[int]) -> GoBack | Stop:
    """What to do once bad steps have halted the hosts. bad: the first of those in a row."""
    if guard.action == "stop":
        return Stop(f"step {bad.step} is bad: guard.action=stop")
    if stop := over_budget(guard, bad_steps):
        return stop
    if guard.action == "rollback":
        return GoBack(max(0, bad.step - guard.rollback_steps), without_batch=True)
    # Passed over, and the steps after it are bad as well: it is the state that is bad, not the batch.
    return GoBack(max(0, bad.step - 1), without_batch=False)
