"""TPU v5p slices: what exists, and how many hosts and chips each has. Source: Cloud TPU v5p documentation."""

import math
from dataclasses import dataclass

from gemma.config import ConfigError

CHIPS_PER_HOST = 4
# What the node of a TPU host says of itself, in a Ray cluster.
NAME_LABEL, RANK_LABEL, TYPE_LABEL = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id", "ray.io/tpu-pod-type"
TOPOLOGIES: dict[str, tuple[int, int, int]] = {
    "v5p-8": (2, 2, 1),
    "v5p-16": (2, 2, 2),
    "v5p-32": (2, 2, 4),
    "v5p-64": (2, 4, 4),
    "v5p-128": (4, 4, 4),
    "v5p-256": (4, 4, 8),
    "v5p-512": (4, 8, 8),
    "v5p-1024": (8, 8, 8),
    "v5p-2048": (8, 8, 16),
    "v5p-4096": (8, 16, 16),
    "v5p-8192": (16, 16, 16),
    "v5p-12288": (16, 16, 24),
}


@dataclass(frozen=True)
class Slice:
    """A slice type. Its name counts cores: v5p-N has N/2 chips."""

    name: str
    topology: str  # as in 2x2x2
    chips: int
    hosts: int


def slice_type(name: str) -> Slice:
    """Raises ConfigError for a name that does not exist."""
    if name not in TOPOLOGIES:
        raise ConfigError(f"cluster.slice={name}: no such slice; allowed: {', '.join(TOPOLOGIES)}")
    shape = TOPOLOGIES[name]
    chips = math.prod(shape)
    return Slice(name, "x".join(map(str, shape)), chips, chips // CHIPS_PER_HOST)
