"""Where the time went: every second of the controller's life lies in one bucket."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BUCKETS = (
    *("step", "replay", "reserve", "start", "data", "compile", "restore", "eval", "save", "snapshot"),
    *("tasks", "detect", "down", "other"),
)


@dataclass
class Ledger:
    """`switch` says what is being done from now on; `move` refines it once the hosts have told more."""

    clock: Callable[[], float] = time.monotonic
    current: str = "other"
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    restarts: int = 0
    incidents: list[dict[str, Any]] = field(default_factory=list)  # what earlier controllers have told
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.clock()

    def switch(self, bucket: str) -> float:
        """Returns the seconds spent in the bucket that ends."""
        now = self.clock()
        spent = now - self.since
        self.seconds[self.current] += spent
        self.current, self.since = bucket, now
        return spent

    def move(self, source: str, target: str, seconds: float) -> None:
        self.switch(self.current)
        seconds = max(0.0, min(seconds, self.seconds[source]))
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def snapshot(self) -> dict[str, object]:
        """What goodput.json holds. Goodput is the share of wall time spent in steps never done before."""
        self.switch(self.current)
        wall = sum(self.seconds.values())
        buckets = {name: round(value, 4) for name, value in self.seconds.items()}
        goodput = self.seconds["step"] / wall if wall else 0.0
        return {"wall_s": round(wall, 4), "goodput": round(goodput, 4), "restarts": self.restarts, "buckets": buckets}

    def held_s(self) -> float:
        """Seconds in which slices were there, or as good as: all but the waiting for them."""
        self.switch(self.current)
        return sum(self.seconds.values()) - self.seconds["reserve"]

    def carry(self, earlier: dict[str, object]) -> None:
        """Adds what earlier controllers of this run have spent."""
        buckets = earlier.get("buckets", {})
        assert isinstance(buckets, dict)
        for name, value in buckets.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + float(value)
        self.restarts += int(str(earlier.get("restarts", 0)))
        incidents = earlier.get("incidents", [])
        assert isinstance(incidents, list)
        self.incidents = incidents
