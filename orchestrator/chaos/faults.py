"""Which faults a rehearsal holds, and when each strikes. Plain values: `chaos` does them."""

import random
from dataclasses import dataclass

from gemma.config import ConfigError, require, require_at_least

KINDS = (*("worker", "crash", "host", "controller", "preempt", "hang", "slow", "tear", "full_disk", "nan", "chip"),)
PHASES = ("check", "compile", "restore", "step", "save")
ALWAYS = {"chip": "check"}  # kinds that strike in one phase only: a spoilt chip is one that the check must find


@dataclass(frozen=True)
class Chaos:
    """Faults on purpose: listed ones, then `random` ones drawn by `seed` from kinds and phases."""

    faults: tuple[str, ...]  # KIND@STEP[:PHASE][/RANK]
    random: int
    kinds: tuple[str, ...]
    phases: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        require_at_least("chaos", {"random": self.random}, 0)
        for key, values, allowed in (("kinds", self.kinds, KINDS), ("phases", self.phases, PHASES)):
            wrong = [value for value in values if value not in allowed]
            require(not wrong and bool(values), f"chaos.{key}={list(values)}: must be among {', '.join(allowed)}")
        for text in self.faults:
            parse(0, text, 1)


LATEST = 0.8  # of the steps: what cannot strike when it is due, because another does, strikes a little later


@dataclass(frozen=True)
class Fault:
    """One fault, at the first moment of its phase once `step` steps are done; a tear, once such a checkpoint is."""

    index: int  # in the plan: each strikes once in a run's life
    kind: str
    step: int
    phase: str
    rank: int


def plan(chaos: Chaos, steps: int, ranks: int) -> list[Fault]:
    """What strikes when: what is listed, then what is drawn by the seed. Pure."""
    found = [parse(index, text, ranks) for index, text in enumerate(chaos.faults)]
    dice = random.Random(chaos.seed)
    for _ in range(chaos.random):
        kind, phase = dice.choice(chaos.kinds), dice.choice(chaos.phases)
        phase = ALWAYS.get(kind, phase)
        step = dice.randrange(1, max(2, int(LATEST * steps)))
        found.append(Fault(len(found), kind, step, phase, dice.randrange(ranks)))
    return found


def check(chaos: Chaos, steps: int | None, ranks: int) -> None:
    """Raises ConfigError for a listed fault that can never strike. steps: of the run; None where nobody knows yet."""
    for text in chaos.faults:
        fault, rank = parse(0, text, 2**31), text.partition("/")[2]
        if int(rank or 0) >= ranks:
            raise ConfigError(f"chaos.faults={text}: the run has hosts 0 to {ranks - 1}")
        if steps is not None and fault.step >= steps:
            raise ConfigError(f"chaos.faults={text}: strikes before the last step; allowed: below train.steps={steps}")


def parse(index: int, text: str, ranks: int) -> Fault:
    """KIND@STEP, KIND@STEP:PHASE, each with /RANK at the end if it is not to be 0. Raises ConfigError."""
    kind, _, rest = text.partition("@")
    when, _, rank = rest.partition("/")
    step, _, phase = when.partition(":")
    phase = phase or ALWAYS.get(kind, "step")
    known = kind in KINDS and phase in PHASES and phase == ALWAYS.get(kind, phase)
    if not known or not step.isdigit() or not (rank or "0").isdigit():
        raise ConfigError(
            f"chaos.faults={text}: must be KIND@STEP[:PHASE][/RANK]; kinds are {', '.join(KINDS)};"
            f" phases are {', '.join(PHASES)}; a chip's is check"
        )
    return Fault(index, kind, int(step), phase, int(rank or 0) % ranks)
