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


@dataclass(frozen=True)
class Row:
    """One step's scalars; `step` counts the steps done, this one included."""

    step: int
    metrics: dict[str, float]
    step_s: float
