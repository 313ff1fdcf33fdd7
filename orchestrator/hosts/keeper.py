"""What stays on a host when its training process dies: it holds the snapshots and watches processes. A Ray actor.

One for each host and run, detached: it outlives the controller too, where the cluster does. The memory is its own
(memfd), so nothing is left of it once this process ends; it ends by itself when nobody has used it for long.
"""

import contextlib
import os
import resource
import secrets
import select
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from gemma.memory import server as shares
from gemma.memory import slots
from gemma.memory.server import Memory
from gemma.memory.wire import Address
from orchestrator.slices import metadata

NOTICE = signal.SIGUSR2  # to a host's process: its machine will be taken away
EXPIRY_CHECK_S = 5.0  # between two checks of whether anybody still needs this process


@dataclass(frozen=True)
class Held:
    """What one host's memory holds."""

    address: Address
    steps: dict[str, tuple[tuple[int, int], ...]]  # (step, attempt) of whole snapshots, by the key of their share
    paths: dict[str, str]  # of the slots of each share, for processes on this host
    done: int  # steps that its training process had done
    deaths: dict[int, float]  # time.time() at which a watched process was seen to end
    ooms: int  # processes killed for memory on this host, as the kernel counts them
    notice: str | None  # that the machine will be taken away


class Keeper:
    """Answers while training goes on; its methods may be called from several threads at once."""

    def __init__(self, ip: str, idle_s: float, metadata_host: str | None = None):
        """idle_s: it ends after so long without a snapshot or a call.

        metadata_host: Google's metadata server, which says if the machine is about to be taken away.
        """
        os.setpriority(os.PRIO_PROCESS, 0, slots.BACKGROUND_NICENESS)
        self.deaths: dict[int, float] = {}
        self.watched: set[int] = set()
        self.lock = threading.Lock()  # of the two above and the notice: held for a moment only
        self.notice: str | None = None
        self.server = shares.open_server(ip, secrets.token_hex(16))
        self.address = self.server.address
        threading.Thread(target=self.expire, args=(idle_s,), daemon=True, name="expiry").start()
        if host := os.environ.get("GCE_METADATA_HOST", metadata_host):
            threading.Thread(target=self.watch_metadata, args=(host,), daemon=True, name="metadata").start()

    def hold(self, key: str, share_bytes: int) -> str:
        """Memory for a share, made where it is missing; the path under which processes of this host open it.

        Raises MemoryError where the host has no room for it.
        """
        self.server.used = time.monotonic()
        return path_of(shares.hold(self.server, key, share_bytes))

    def inventory(self) -> Held:
        self.server.used = time.monotonic()
        with self.server.lock:
            memories = dict(self.server.memories)
        with self.lock:
            deaths, notice = dict(self.deaths), self.notice
        return Held(
            self.address,
            {key: shares.held_steps(memory) for key, memory in memories.items()},
            {key: path_of(memory) for key, memory in memories.items()},
            max((slots.progress(memory.slots)[0] for memory in memories.values()), default=0),
            deaths,
            oom_kills(),
            notice,
        )

    def go_back(self, step: int) -> None:
        """Gives up every snapshot beyond a step that the run goes back to, and those on their way in."""
        shares.go_back(self.server, step)

    def watch(self, pid: int) -> None:
        """Notes when a process ends."""
        with self.lock:
            if pid in self.watched:
                return
            self.watched.add(pid)
            leaving = self.notice is not None
        if leaving:
            self.signal(pid, NOTICE)
        threading.Thread(target=self.wait_for_end, args=(pid,), daemon=True, name=f"watch-{pid}").start()

    def wait_for_end(self, pid: int) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self.note_death(pid)
            return
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
        finally:
            os.close(descriptor)
        self.note_death(pid)

    def note_death(self, pid: int) -> None:
        with self.lock:
            self.deaths[pid] = time.time()

    def watch_metadata(self, metadata_host: str) -> None:
        """Signals the process at work, once, that the machine is about to be taken away."""
        while True:
            try:
                notice = metadata.notice(metadata_host)
            except OSError:
                time.sleep(metadata.RETRY_S)  # not a machine of Google's, or the server restarts
                continue
            with self.lock:
                fresh = notice is not None and self.notice is None
                self.notice, watched = notice, sorted(self.watched)
            for pid in watched if fresh else ():
                self.signal(pid, NOTICE)
            time.sleep(metadata.ASK_EVERY_S)

    def signal(self, pid: int, number: int) -> bool:
        """Sends a signal to a process that this keeper watches; False for any other, or where it is gone."""
        if pid not in self.watched:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def stacks(self, pid: int) -> str:
        """State, place in the kernel and name of each thread of a process, which writes its Python stacks itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        return "\n".join(self.threads(pid))

    def threads(self, pid: int) -> list[str]:
        found = []
        for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
            with contextlib.suppress(OSError):
                state = task.joinpath("stat").read_text().rpartition(")")[2].split()[0]
                name, waits_in = task.joinpath("comm").read_text().strip(), task.joinpath("wchan").read_text()
                found.append(f"{state} {waits_in} {name}")
        return found

    def freeze(self, pid: int, seconds: float) -> None:
        """A process stands still for a while. For rehearsals, as are the next two."""
        self.signal(pid, signal.SIGSTOP)
        threading.Timer(seconds, self.signal, (pid, signal.SIGCONT)).start()

    def fill(self, pid: int, seconds: float) -> None:
        """For a process the disk is full for a while: none of its files grows."""
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        threading.Timer(seconds, resource.prlimit, (pid, resource.RLIMIT_FSIZE, unlimited)).start()

    def end_host(self, pid: int) -> None:
        """All of Ray on this host ends at once, this keeper last."""
        parent = os.getppid()
        for found in {pid, parent, *children(parent)} - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def expire(self, idle_s: float) -> None:
        """Ends this process once nobody has called it or written to its memory for so long."""
        newest = 0.0
        while True:
            time.sleep(min(EXPIRY_CHECK_S, idle_s / 4))
            with self.server.lock:
                memories = list(self.server.memories.values())
            at = max((slots.progress(memory.slots)[1] for memory in memories), default=0.0)
            if at > newest:
                newest, self.server.used = at, time.monotonic()
            if time.monotonic() - self.server.used > idle_s:
                os._exit(0)


def path_of(memory: Memory) -> str:
    return f"/proc/{os.getpid()}/fd/{memory.descriptor}"


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def oom_kills() -> int:
    """The kernel's count for this machine; where it has none, for this control group; else 0."""
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
