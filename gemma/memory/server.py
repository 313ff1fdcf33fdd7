"""The shares that a host holds, and the threads that take and give them over TCP. No JAX.

Nobody waits for the network here but the thread that serves it: a share is received into a slot that is marked as
empty, without a lock, so what is held whole can be listed and given up at any time, however slow a sender is.
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from gemma.memory import slots, wire
from gemma.memory.slots import Slots
from gemma.memory.wire import Address, Answer, Request, WireError

MEMORY_SHARE = 0.8  # of the free memory of a host is what snapshots may take
SHARES = 16  # at most on one host: its own and its buddy's, again for each layout that the run has had
STRANGERS = 32  # connections at most that have not yet shown that they know the token
CLIENTS = 256  # connections at most that have
ACCEPT_AGAIN_S = 0.1  # after accepting failed: too many open files


@dataclass
class Receiving:
    """A share on its way in."""

    connection: socket.socket
    cancelled: bool = False


@dataclass
class Memory:
    """The slots of one share."""

    slots: Slots
    descriptor: int
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the slots' headers: held for a moment only
    incoming: threading.Lock = field(default_factory=threading.Lock)  # held by the thread that receives a share
    receiving: Receiving | None = None


@dataclass
class Server:
    listener: socket.socket
    address: Address
    lock: threading.Lock = field(default_factory=threading.Lock)  # of what is below: held for a moment only
    memories: dict[str, Memory] = field(default_factory=dict)
    strangers: dict[socket.socket, None] = field(default_factory=dict)  # the oldest first
    clients: set[socket.socket] = field(default_factory=set)
    used: float = field(default_factory=time.monotonic)  # time.monotonic() of the newest request


def open_server(ip: str, token: str) -> Server:
    """Listens at any free port, from now on until the process ends."""
    listener = socket.create_server((ip, 0))
    server = Server(listener, Address(ip, listener.getsockname()[1], token))
    threading.Thread(target=serve, args=(server,), daemon=True, name="server").start()
    return server


def hold(server: Server, key: str, share_bytes: int) -> Memory:
    """Memory for a share, made where it is missing. Raises MemoryError, ValueError for another size than it has."""
    with server.lock:
        memory = server.memories.get(key)
        if memory is None:
            if len(server.memories) >= SHARES:
                raise MemoryError(f"this host holds {SHARES} shares already")
            check_room(slots.file_bytes(share_bytes) + sum(map(untouched_bytes, server.memories.values())))
            descriptor = os.memfd_create(f"gemma-{key}")
            os.ftruncate(descriptor, slots.file_bytes(share_bytes))
            memory = server.memories[key] = Memory(slots.clear(descriptor, share_bytes), descriptor)
    if memory.slots.share_bytes != share_bytes:
        raise ValueError(f"share {key} is of {memory.slots.share_bytes} bytes, not {share_bytes}")
    return memory


def untouched_bytes(memory: Memory) -> int:
    """What was promised to a share and is not yet taken from the host."""
    return os.fstat(memory.descriptor).st_size - 512 * os.fstat(memory.descriptor).st_blocks


def check_room(wanted_bytes: int) -> None:
    """Raises MemoryError where so much memory would leave the host too little."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = int(lines["MemAvailable"].split()[0]) << 10
    if wanted_bytes > MEMORY_SHARE * free_bytes:
        wanted, free = f"{wanted_bytes / 1e9:.1f} GB", f"{free_bytes / 1e9:.1f} GB"
        raise MemoryError(f"snapshots need {wanted} of the {free} that are free on this host")


def held_steps(memory: Memory) -> tuple[tuple[int, int], ...]:
    """(step, attempt) of each whole snapshot whose notes can be read."""
    found = []
    with memory.lock:
        for step in slots.held(memory.slots):
            with contextlib.suppress(KeyError, ValueError):  # its own process has just begun to write there; damaged
                found.append((step, attempt_of(slots.raw_notes(memory.slots, step))))
    return tuple(sorted(found))


def attempt_of(notes: bytes) -> int:
    """The attempt that made a snapshot. Raises ValueError for notes that do not say it."""
    try:
        found = json.loads(notes)
    except RecursionError as error:
        raise ValueError("notes are nested too deeply") from error
    attempt = found.get("attempt") if isinstance(found, dict) else None
    if type(attempt) is not int or attempt < 0:
        raise ValueError("notes do not say which attempt they are of")
    return attempt


def go_back(server: Server, step: int) -> None:
    """Gives up every snapshot beyond a step, and whatever is on its way in."""
    with server.lock:
        memories = list(server.memories.values())
    for memory in memories:
        with memory.lock:
            cancel(memory)
            slots.drop_after(memory.slots, step)


def cancel(memory: Memory) -> None:
    """What is being received will not be held; its thread ends at once. Under the memory's lock."""
    if memory.receiving is not None:
        memory.receiving.cancelled = True
        shut(memory.receiving.connection)


def shut(connection: socket.socket) -> None:
    """Wakes the thread that waits for the other end."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def serve(server: Server) -> None:
    """A thread for each connection. Of too many strangers the oldest goes, so that silent ones keep nobody out."""
    while True:
        try:
            connection, _ = server.listener.accept()
        except OSError:
            if server.listener.fileno() == -1:
                return
            time.sleep(ACCEPT_AGAIN_S)
            continue
        with server.lock:
            if len(server.strangers) >= STRANGERS:
                oldest = next(iter(server.strangers))
                del server.strangers[oldest]
                shut(oldest)
            server.strangers[connection] = None
        try:
            threading.Thread(target=attend, args=(server, connection), daemon=True, name="client").start()
        except RuntimeError:  # the system allows no more threads
            forget(server, connection)
            connection.close()


def attend(server: Server, connection: socket.socket) -> None:
    """One client, until it closes, fails to show that it knows the token, or breaks the rules."""
    try:
        with connection, contextlib.suppress(OSError):
            wire.configure(connection)
            wire.authenticate(connection, server.address.token)
            with server.lock:
                if connection not in server.strangers or len(server.clients) >= CLIENTS:
                    return
                del server.strangers[connection]
                server.clients.add(connection)
            while request := wire.receive_request(connection):
                server.used = time.monotonic()
                try:
                    {"put": take, "get": give, "drop": give_up}[request.verb](server, connection, request)
                except (KeyError, ValueError, MemoryError) as error:
                    wire.send_answer(connection, Answer(str(error.args[0] if error.args else error) or "no memory"))
    finally:
        forget(server, connection)


def forget(server: Server, connection: socket.socket) -> None:
    with server.lock:
        server.strangers.pop(connection, None)
        server.clients.discard(connection)


def take(server: Server, connection: socket.socket, request: Request) -> None:
    """Receives a share into an empty slot. A later sender of the same share takes the place of an earlier one."""
    with server.lock:
        sizes = {memory.slots.share_bytes for memory in server.memories.values()}
    if request.key not in server.memories and sizes and request.share_bytes not in sizes:
        raise ValueError(f"shares here are of {sorted(sizes)} bytes, not {request.share_bytes}")
    memory = hold(server, request.key, request.share_bytes)
    with memory.lock:
        cancel(memory)
    if not memory.incoming.acquire(timeout=wire.STALL_S / 2):
        raise ValueError(f"share {request.key} is being received from elsewhere")
    receiving = Receiving(connection)
    try:
        with memory.lock:
            slot, view = slots.begin(memory.slots, request.step)
            memory.receiving = receiving
        wire.send_answer(connection, Answer())
        deadline = time.monotonic() + wire.TRANSFER_S
        wire.receive_into(connection, view, deadline)
        notes = wire.receive(connection, request.notes_bytes, deadline)
        attempt_of(notes)
        with memory.lock:
            if receiving.cancelled:
                raise WireError("the run has gone back meanwhile")
            slots.commit(memory.slots, slot, request.step, notes)
    finally:
        with memory.lock:
            memory.receiving = None
        memory.incoming.release()
    wire.send_answer(connection, Answer())


def give(server: Server, connection: socket.socket, request: Request) -> None:
    """Sends a share that is held. No lock is held meanwhile: should its slot be written to, the last answer says so."""
    memory = find(server, request.key)
    with memory.lock:
        slot = slots.held(memory.slots).get(request.step)
        if slot is None:
            raise KeyError(f"no step {request.step} of {request.key}")
        notes = slots.raw_notes(memory.slots, request.step)
        view = slots.share(memory.slots, slot)
    wire.send_answer(connection, Answer("", len(view), len(notes)))
    deadline = time.monotonic() + wire.TRANSFER_S
    wire.send(connection, view, deadline)
    wire.send(connection, notes, deadline)
    kept = slots.held(memory.slots).get(request.step) == slot
    wire.send_answer(connection, Answer("" if kept else f"step {request.step} was given up meanwhile"))


def give_up(server: Server, connection: socket.socket, request: Request) -> None:
    """One step of a share, which whoever has read it found to be damaged."""
    memory = find(server, request.key)
    with memory.lock:
        slots.drop(memory.slots, request.step)
    wire.send_answer(connection, Answer())


def find(server: Server, key: str) -> Memory:
    with server.lock:
        memory = server.memories.get(key)
    if memory is None:
        raise KeyError(f"no share {key}")
    return memory
