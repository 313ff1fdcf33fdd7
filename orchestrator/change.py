"""What a resumed run may change. Pure: old and new values in, judgements out."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gemma.config import ConfigError


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
    if section in ("model", "run", "evaluate") or key == "train.init_from":
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


def refuse(found: list[Change], allow_data_change: bool) -> None:
    """Raises ConfigError for what may not change."""
    for change in found:
        if change.kind is Kind.FORBIDDEN:
            raise ConfigError(f"{change.key}={change.new}: a resumed run keeps {change.key}={change.old}")
        if change.kind is Kind.DATA and not allow_data_change:
            raise ConfigError(
                f"{change.key}={change.new}: changes the data order (was {change.old});"
                " allowed with resume.allow_data_change=true"
            )
