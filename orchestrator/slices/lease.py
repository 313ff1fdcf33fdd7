"""What a provider gives a run beside the slices themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it loads Ray, which launch.cluster list can do without
    from orchestrator.hosts.placement import Spot


@dataclass(frozen=True)
class Lease:
    repair: Callable[[], None]  # replaces lost hosts: called again and again; NoSlicesError once there will be none
    discard: Callable[["Spot", str], None]  # asks for another host instead of a bad one, and says why; may be repeated
    news: Callable[[], None]  # reports new events to the user: called repeatedly
    owns: Callable[[str], bool] = lambda name: True  # whether a slice of the Ray cluster is the run's to use, by name
    check_head: Callable[[], None] = lambda: None  # NoSlicesError once the cluster's head has ended: called often
    resize: Callable[[int], None] = lambda count: None  # so many slices are wanted from now on


def avoided(spot: "Spot", why: str) -> None:
    """The run goes around a bad host; whoever keeps the cluster replaces it."""
