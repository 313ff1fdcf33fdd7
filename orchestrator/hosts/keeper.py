"""What stays on a host when its training process dies: the memory of snapshots, and a pair of eyes. A Ray actor.

One a host and run, detached: it outlives the controller too, where the cluster does. The memory is its own (memfd), so
nothing is left of it once this process ends; it ends by itself when nobody has used it for long.
"""

import contextlib
import os
import resource
import secrets
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma.memory import slots, wire
from gemma.memory.slots import Slots
from gemma.memory.wire import Address
from orchestrator.slices import metadata

NOTICE = signal.SIGUSR2  # to a host's process: its machine will be taken away
MOST = 0.8  # of the free memory of a host
FRESH_S = 5.0  # between two looks at whether anybody still needs this


@dataclass(frozen=True)
class Held:
    """What one host's memory holds."""

    address: Address
    steps: dict[str, tuple[tuple[int, int], ...]]  # (step, attempt) of whole snapshots, by the key of their share
    paths: dict[str, str]  # of the slots of each share, for processes on this host
    done: int  # steps its training process had done, the newest it told
    deaths: dict[int, float]  # time.time() at which a watched process was seen to end
    ooms: int  # processes killed for memory on this host, as the kernel counts them
    notice: str | None  # that the machine will be taken away


@dataclass
class Memory:
    slots: Slots
    descriptor: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class Keeper:
    """Answers while training goes on; its methods may be called at once from several sides."""

    def __init__(self, ip: str, idle_s: float, metadata_host: str | None = None):
        """idle_s: it ends after so long without a snapshot or a call. metadata_host: knows if the machine stays."""
        os.setpriority(os.PRIO_PROCESS, 0, slots.BACKGROUND_NICENESS)
        self.memories: dict[str, Memory] = {}
        self.deaths: dict[int, float] = {}
        self.watched: set[int] = set()
        self.lock = threading.Lock()
        self.notice: str | None = None
        self.used = time.monotonic()
        self.listener = socket.create_server((ip, 0))
        self.address = Address(ip, self.listener.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=self.serve, daemon=True, name="server").start()
        threading.Thread(target=self.expire, args=(idle_s,), daemon=True, name="expiry").start()
        if asked := os.environ.get("GCE_METADATA_HOST", metadata_host):
            threading.Thread(target=self.look_out, args=(asked,), daemon=True, name="metadata").start()

    def hold(self, key: str, share_bytes: int) -> str:
        """Memory for a share, made where it is missing; the path under which processes of this host open it."""
        self.used = time.monotonic()
        return self.path(self.memory(key, share_bytes))

    def memory(self, key: str, share_bytes: int) -> Memory:
        with self.lock:
            if key not in self.memories:
                check_room(slots.file_bytes(share_bytes))
                descriptor = os.memfd_create(f"gemma-{key}")
                os.ftruncate(descriptor, slots.file_bytes(share_bytes))
                self.memories[key] = Memory(slots.clear(descriptor, share_bytes), descriptor)
            return self.memories[key]

    def path(self, memory: Memory) -> str:
        return f"/proc/{os.getpid()}/fd/{memory.descriptor}"

    def inventory(self) -> Held:
        self.used = time.monotonic()
        with self.lock:
            memories = dict(self.memories)
            deaths = dict(self.deaths)
        return Held(
            self.address,
            {key: whole(m) for key, m in memories.items()},
            {key: self.path(m) for key, m in memories.items()},
            max((slots.progress(m.slots)[0] for m in memories.values()), default=0),
            deaths,
            oom_kills(),
            self.notice,
        )

    def go_back(self, step: int) -> None:
        """Gives up every snapshot beyond a step that the run goes back to."""
        with self.lock:
            for memory in self.memories.values():
                with memory.lock:
                    slots.drop_after(memory.slots, step)

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
            self.deaths[pid] = time.time()
            return
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
        finally:
            os.close(descriptor)
        with self.lock:
            self.deaths[pid] = time.time()

    def look_out(self, metadata_host: str) -> None:
        """Tells the process at work, once, that the machine is about to be taken away."""
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
        """Only a process that this keeper was told to watch; False where it is gone."""
        if pid not in self.watched:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def stacks(self, pid: int) -> str:
        """State, place in the kernel and name of each thread of a process. Its Python stacks it writes itself."""
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
        """To a process the disk is full for a while: no file of its grows."""
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        threading.Timer(seconds, resource.prlimit, (pid, resource.RLIMIT_FSIZE, unlimited)).start()

    def end_host(self, pid: int) -> None:
        """All of Ray on this host ends at once, this keeper last."""
        parent = os.getppid()
        others = [found for found in children(parent) if found != os.getpid()]
        for found in {pid, parent, *others}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.attend, args=(connection,), daemon=True, name="client").start()

    def attend(self, connection: socket.socket) -> None:
        """One client, until it closes."""
        with connection, contextlib.suppress(OSError, ValueError, KeyError, MemoryError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            while head := wire.receive_head(connection):  # as long as it takes: the next step may be far
                connection.settimeout(wire.TIMEOUT_S)
                if not secrets.compare_digest(str(head.get("token")), self.address.token):
                    return
                self.used = time.monotonic()
                if head["verb"] == "put":
                    self.take(connection, head)
                else:
                    self.give(connection, head)
                connection.settimeout(None)

    def take(self, connection: socket.socket, head: dict[str, Any]) -> None:
        memory = self.memory(head["key"], head["bytes"])
        with memory.lock:
            slot, view = slots.begin(memory.slots, head["step"])
            wire.receive_into(connection, view)
            notes = bytearray(head["notes"])
            wire.receive_into(connection, memoryview(notes))
            slots.commit(memory.slots, slot, head["step"], bytes(notes))
        wire.send(connection, {})

    def give(self, connection: socket.socket, head: dict[str, Any]) -> None:
        memory = self.memories.get(head["key"])
        if memory is None or head["step"] not in slots.held(memory.slots):
            wire.send(connection, {"error": f"no step {head['step']} of {head['key']}"})
            return
        with memory.lock:
            view = slots.share(memory.slots, slots.held(memory.slots)[head["step"]])
            notes = slots.raw_notes(memory.slots, head["step"])
            wire.send(connection, {"bytes": len(view), "notes": len(notes)}, view, notes)

    def expire(self, idle_s: float) -> None:
        newest = 0.0
        while True:
            time.sleep(min(FRESH_S, idle_s / 4))
            with self.lock:
                at = max((slots.progress(m.slots)[1] for m in self.memories.values()), default=0.0)
            if at > newest:
                newest, self.used = at, time.monotonic()
            if time.monotonic() - self.used > idle_s:
                os._exit(0)


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def whole(memory: Memory) -> tuple[tuple[int, int], ...]:
    with memory.lock:
        return tuple(sorted((step, slots.notes(memory.slots, step)["attempt"]) for step in slots.held(memory.slots)))


def check_room(wanted_bytes: int) -> None:
    """Raises MemoryError where so much memory would leave the host too little."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = int(told["MemAvailable"].split()[0]) << 10
    if wanted_bytes > MOST * free_bytes:
        wanted, free = f"{wanted_bytes / 1e9:.1f} GB", f"{free_bytes / 1e9:.1f} GB"
        raise MemoryError(f"snapshots need {wanted} of the {free} that are free on this host")


def oom_kills() -> int:
    """The kernel's count for this machine; where it is not told, for this control group; 0 where that is not either."""
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
