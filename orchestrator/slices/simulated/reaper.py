"""Ends the processes of a simulated cluster: by command, or when the process that started it dies.

Run as a script it outlives its parent by a moment: it reads process groups from standard input, a line each
(negated: forget it), and kills them all once that input ends. Standard library only: it starts in milliseconds.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

STOP_TIMEOUT_S = 5.0


def members(groups: set[int]) -> list[int]:
    """The processes of these groups that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) in groups and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def kill_groups(groups: set[int]) -> None:
    """Kill all processes of these groups, and those that they start meanwhile."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while left := members(groups):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for killed processes to end: {left}")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def reap(parent: int, temp_dir: str) -> None:
    """Kill the process groups named on standard input once that ends, or the parent does.

    The parent is watched too, because a child that it forked may keep the pipe open.
    """
    lines = b""
    while os.getppid() == parent or select.select([0], [], [], 0)[0]:
        if select.select([0], [], [], 0.25)[0]:
            if not (data := os.read(0, 4096)):
                break
            lines += data
    told = [int(line) for line in lines.split()]
    kill_groups({group for group in told if group > 0 and -group not in told})
    shutil.rmtree(temp_dir)


if __name__ == "__main__":
    reap(int(sys.argv[1]), sys.argv[2])
