"""What the hosts tell one another about a save, through JAX's coordinator: no device and no program takes part.

While a checkpoint is written Orbax lets the hosts meet at barriers. A host that fails stays away from them, and the
others would wait for it until their deadline. `Votes` stands in for those barriers: the host that failed comes all the
same and says so. A save succeeds on all hosts or fails on all of them, at once, and the next can begin.
"""

import os
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import jax
from jax._src import distributed

VOTE_S = 600.0  # hosts come to a save a window apart at most; the controller sees before this who is dead
ERROR_CHARS = 300  # characters of an error

# Orbax 0.12 names its barriers so. Its flag "a save is under way" is changed twice in a save: up first, down last.
WRITTEN, COMMITTED = "async_write_complete", "async_commit_complete"
FLAG_BEGINS, FLAG_ENDS = "set_value_start", "set_value_end"
WRITER = "async_save"  # the thread that comes to WRITTEN and COMMITTED

THERE = "there"  # a vote: this step is on disk already


class SaveFailedError(RuntimeError):
    """Some host could not write its part."""


@dataclass
class Votes:
    """Of one process; `Votes()` is that of a process alone."""

    client: Any = None  # JAX's connection to the coordinator
    rank: int = 0
    number: int = 0  # of the votes so far: every host counts the same
    flags: int = 0  # changes of Orbax's flag since then
    passed: set[str] = field(default_factory=set)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier `key`. Raises SaveFailedError where a host had to say that it failed."""
        if FLAG_BEGINS in key:
            self.flags += 1
            if self.flags == 2:
                self.catch_up(timeout_ms)
        name = next((name for name in (WRITTEN, COMMITTED) if name in key), f"{key}/{self.flags}")
        self.passed.add(name)
        if problems := self.meet(name, timeout_ms):
            raise SaveFailedError(one_of(problems))

    def catch_up(self, timeout_ms: int) -> None:
        """The save has ended here, well or badly: joins the open barriers, so no host waits."""
        for thread in threading.enumerate():
            if thread.name == WRITER:
                thread.join(timeout_ms / 1000)
        error = sys.exception()
        problem = (
            None if error is None or isinstance(error, SaveFailedError) else f"{here(self.rank)}: {one_line(error)}"
        )
        for name in (WRITTEN, COMMITTED):
            if self.client and name not in self.passed:
                self.passed.add(name)
                self.meet(name, timeout_ms, problem)

    def meet(self, name: str, timeout_ms: float, said: str | None = None) -> list[str]:
        """Waits for all hosts; returns what any of them has said, in rank order."""
        if self.client is None:
            return [said] if said else []
        place = f"gemma/save/{self.number}/{name}"
        if said:
            self.client.key_value_set(f"{place}/said/{self.rank:06d}", said)
        self.client.wait_at_barrier(place, int(timeout_ms))
        return [text for _, text in sorted(self.client.key_value_dir_get(f"{place}/said/"))]


def of_this_process() -> Votes:
    several = jax.process_count() > 1
    return Votes(distributed.global_state.client, jax.process_index()) if several else Votes()


def agree(votes: Votes, problem: str | None, there: bool) -> tuple[str | None, bool]:
    """Whether all hosts can save now: the problem of any, and whether any has the step on disk already."""
    votes.number += 1
    votes.flags = 0
    votes.passed.clear()
    said = votes.meet("vote", VOTE_S * 1000, problem or (THERE if there else None))
    problems = [text for text in said if text != THERE]
    return (one_of(problems) if problems else None), bool(said)


def one_of(problems: list[str]) -> str:
    more = len(problems) - 1
    return problems[0] + (f" (and {more} more {'host' if more == 1 else 'hosts'})" if more else "")


def here(rank: int) -> str:
    return f"host {rank} ({socket.gethostname()})"


def one_line(error: BaseException) -> str:
    """An error in a line. From a long storage-library error, only the system's error."""
    text = " ".join(str(error).split())
    if isinstance(error, SaveFailedError):
        return text
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {text[:ERROR_CHARS]}"
