"""TPU v5p slices: what exists, and how many hosts and chips each has. Source: Cloud TPU v5p documentation."""

import math
import re
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


def slice_type(name: str, topology: str | None = None) -> Slice:
    """Raises ConfigError for a name that does not exist, or a topology that is none of its chips."""
    if name not in TOPOLOGIES:
        raise ConfigError(f"cluster.slice={name}: no such slice; allowed: {', '.join(TOPOLOGIES)}")
    shape = TOPOLOGIES[name]
    chips = math.prod(shape)
    usual = "x".join(map(str, shape))
    if topology is None:
        return Slice(name, usual, chips, chips // CHIPS_PER_HOST)
    sides = [int(side) for side in topology.split("x")] if re.fullmatch(r"\d{1,3}x\d{1,3}x\d{1,3}", topology) else []
    whole = len(sides) == 3 and math.prod(sides) == chips
    cubes = whole and (chips < 64 or all(side % 4 == 0 for side in sides))  # a large slice is made of cubes of 4x4x4
    if not cubes or (chips < 64 and topology != usual):
        shapes = f"{usual}, or other AxBxC of {chips} chips, each side a multiple of 4" if chips >= 64 else usual
        raise ConfigError(f"cluster.topology={topology}: allowed for cluster.slice={name}: {shapes}")
    return Slice(name, topology, chips, chips // CHIPS_PER_HOST)
