"""The learning rate by updates made, as pieces: gemma.train.optim builds a JAX function of them, `rate` a number.

Plain, so that a command can print what a change does to the rate. A schedule depends on `Optim` alone: another
`train.steps` neither stretches it nor compiles anything.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from gemma.config import Optim

WSD_DECAY_FRACTION = 0.1  # of decay_steps, where optim.wsd_decay_steps is null


@dataclass(frozen=True)
class Piece:
    """The rate goes from `start`, in `steps` updates, to `end`; the next piece begins `length` updates on."""

    start: float
    end: float
    steps: int
    shape: Literal["linear", "cosine"]
    length: float  # math.inf: the last piece


def resolved(optim: Optim, steps: int) -> Optim:
    """The schedule of a run that begins with train.steps=steps: its null lengths become numbers, which the run keeps.

    With optim.schedule=constant they stay null: they mean nothing until another schedule is chosen.
    """
    if optim.schedule == "constant":
        return optim
    decay_steps = max(steps, optim.warmup_steps + 1) if optim.decay_steps is None else optim.decay_steps
    if optim.schedule != "wsd" or optim.wsd_decay_steps is not None:
        return replace(optim, decay_steps=decay_steps)
    wsd_decay_steps = min(math.ceil(WSD_DECAY_FRACTION * decay_steps), decay_steps - optim.warmup_steps)
    return replace(optim, decay_steps=decay_steps, wsd_decay_steps=wsd_decay_steps)


def pieces(optim: Optim) -> list[Piece]:
    """Warm-up from lr / warmup_steps to lr, then the schedule, which ends at decay_steps. `optim` must be resolved."""
    lr, end, warmup = optim.lr, optim.lr * optim.final_lr_ratio, optim.warmup_steps
    # The warm-up starts one step in: at exactly 0 the first batch would teach nothing.
    out = [Piece(lr / warmup, lr, max(warmup - 1, 1), "linear", warmup)] if warmup else []
    if optim.schedule == "constant" or optim.schedule == "wsd" and optim.wsd_decay_steps == 0:
        return [*out, Piece(lr, lr, 1, "linear", math.inf)]
    if optim.decay_steps is None:
        raise ValueError("optim.decay_steps is null: `resolved` makes it a number when a run begins")
    if optim.schedule == "wsd":
        if optim.wsd_decay_steps is None:
            raise ValueError("optim.wsd_decay_steps is null: `resolved` makes it a number when a run begins")
        stable = optim.decay_steps - optim.wsd_decay_steps - warmup
        return [
            *out,
            *([Piece(lr, lr, 1, "linear", stable)] if stable else []),
            Piece(lr, end, optim.wsd_decay_steps, "linear", math.inf),
        ]
    return [*out, Piece(lr, end, optim.decay_steps - warmup, optim.schedule, math.inf)]


def rate(optim: Optim, updates: int) -> float:
    """The rate of the update that follows `updates` others."""
    for piece in pieces(optim):
        if updates < piece.length:
            done = min(updates / piece.steps, 1.0)
            left = (1 + math.cos(math.pi * done)) / 2 if piece.shape == "cosine" else 1 - done
            return piece.end + (piece.start - piece.end) * left
        updates -= int(piece.length)
    raise AssertionError("the last piece has no end")


def settled(optim: Optim) -> int | None:
    """The number of updates after which the rate stays what it is; None where it is constant after the warm-up."""
    decays = optim.schedule != "constant" and not (optim.schedule == "wsd" and optim.wsd_decay_steps == 0)
    return optim.decay_steps if decays else None
