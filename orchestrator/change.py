"""What a resumed run may change. Pure: old and new values in, judgements out."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gemma.config import ConfigError, Optim
from gemma.schedule import rate


class Kind(Enum):
    SAFE = "safe"
    RESHARDING = "resharding"
    TRAINING = "changes the training from here on"
    DATA = "changes the data order"
    FORBIDDEN = "forbidden"


@dataclass(frozen=True)
class Change:
    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new} ({self.kind.value})"


def kind_of(key: str) -> Kind:
    section = key.split(".")[0]
    if key == "run.cache":
        return Kind.SAFE
    if section in ("model", "run", "evaluate", "serve") or key == "train.init_from":
        return Kind.FORBIDDEN
    if section in ("mesh", "cluster"):
        return Kind.RESHARDING
    if section == "data" or key in ("train.seed", "train.batch"):
        return Kind.DATA
    if section in ("optim", "guard") or key in ("train.dtype", "train.accumulation"):
        return Kind.TRAINING
    return Kind.SAFE


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every key (flat, dotted) whose value differs."""
    return [
        Change(key, old.get(key), new.get(key), kind_of(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse(found: list[Change], allow_data_change: bool, whose: str = "a resumed run") -> None:
    """Raises ConfigError for what may not change."""
    for change in found:
        if change.kind is Kind.FORBIDDEN:
            raise ConfigError(f"{change.key}={change.new}: {whose} keeps {change.key}={change.old}")
        if change.kind is Kind.DATA and not allow_data_change:
            raise ConfigError(
                f"{change.key}={change.new}: changes the data order (was {change.old});"
                " allowed with resume.allow_data_change=true"
            )


def rates(old: Optim, new: Optim, done: int, steps: int) -> str:
    """What a resume does to the learning rate: before and after it, for its first step and its last."""
    before, first, last = rate(old, done), rate(new, done), rate(new, steps - 1)
    from_here = f"{first:.3g} as before" if first == before else f"{before:.3g} -> {first:.3g}"
    return f"learning rate of step {done + 1}: {from_here}; of step {steps}, the last: {last:.3g}"


def extending(optim: Optim, steps: int) -> str:
    """What a run that has done its steps can go on with: the rate that `train.steps` alone leads to, and other ways."""
    here = rate(optim, steps)
    if optim.schedule == "constant" or optim.schedule == "wsd" and optim.wsd_decay_steps == 0:
        if 2 * steps - max(steps // 5, 1) < optim.warmup_steps:
            return f"learning rate {here:.3g} goes on"
        decay = f"optim.schedule=wsd optim.decay_steps={2 * steps} optim.wsd_decay_steps={max(steps // 5, 1)}"
        return f"learning rate {here:.3g} goes on; to decay to the end: {decay}"
    if here == optim.lr * optim.final_lr_ratio:
        return f"learning rate {here:.3g}, the schedule's last, goes on"
    return f"learning rate goes on from {here:.3g} and is final at step {optim.decay_steps} (optim.decay_steps)"
