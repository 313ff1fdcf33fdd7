"""Snapshots from host to host over TCP. No JAX, no pickle, no text that is parsed: heads of a fixed size, then bytes.

The network is shared with strangers, so nothing of a peer is read beyond 64 bytes until it has proved that it knows the
token, and nothing is allocated by what it says. A connection goes:

    server: nonce                     client: nonce, proof of the token by both nonces
    server: its own proof             (a port may have been taken over by another process)
    client: Request                   server: Answer, and so on until the client closes
      put: once the answer is good, share and notes follow, and a second answer says that they are held
      get: share and notes follow a good answer, and a second answer says that they were held until they were sent

Every read and write has a deadline for the whole message, and for each pause in it.
"""

import hmac
import json
import re
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma.memory import slots

CONNECT_S = 10.0  # for the other end to accept a connection
HANDSHAKE_S = 10.0  # for both proofs
HEAD_S = 10.0  # for a request or an answer, from its first byte
STALL_S = 10.0  # without a single byte of a payload: the peer or the network is gone
TRANSFER_S = 60.0  # for a whole payload
IDLE_S = 600.0  # between two requests: the next snapshot may be far
CHUNK_BYTES = 1 << 20

NONCE_BYTES = PROOF_BYTES = 32
Verb = Literal["put", "get", "drop"]
VERBS: tuple[Verb, ...] = ("put", "get", "drop")
KEY = re.compile(rb"[0-9A-Za-z_-]{1,64}")
REQUEST = struct.Struct("<B64sqqq")  # verb, key, step, bytes of the share, bytes of the notes
ANSWER = struct.Struct("<B200sqq")  # 0 or 1 for refused, why, bytes of the share, bytes of the notes


class WireError(ConnectionError):
    """The other end is gone, is not who it should be, or does not hold what was asked for."""


@dataclass(frozen=True)
class Address:
    """Where a host's keeper listens, and the secret of those who may speak to it."""

    ip: str
    port: int
    token: str = field(repr=False)


@dataclass(frozen=True)
class Source:
    """Where a share can be read: slots in this host's memory, or another host's keeper."""

    path: str | None
    address: Address | None


@dataclass(frozen=True)
class Request:
    verb: Verb
    key: str
    step: int
    share_bytes: int = 0
    notes_bytes: int = 0


@dataclass(frozen=True)
class Answer:
    problem: str = ""
    share_bytes: int = 0
    notes_bytes: int = 0


def connect(address: Address) -> socket.socket:
    """A connection on which both ends have proved that they know the token. Raises OSError."""
    connection = socket.create_connection((address.ip, address.port), timeout=CONNECT_S)
    try:
        configure(connection)
        deadline = time.monotonic() + HANDSHAKE_S
        nonces = receive(connection, NONCE_BYTES, deadline) + secrets.token_bytes(NONCE_BYTES)
        send(connection, nonces[NONCE_BYTES:] + proof(address.token, b"client", nonces), deadline)
        if not hmac.compare_digest(receive(connection, PROOF_BYTES, deadline), proof(address.token, b"server", nonces)):
            raise WireError(f"{address.ip}:{address.port} does not know this run's token")
    except BaseException:
        connection.close()
        raise
    return connection


def authenticate(connection: socket.socket, token: str) -> None:
    """The server's side of `connect`. Raises OSError for a peer that does not know the token, or is slow to show it."""
    deadline = time.monotonic() + HANDSHAKE_S
    nonce = secrets.token_bytes(NONCE_BYTES)
    send(connection, nonce, deadline)
    answer = receive(connection, NONCE_BYTES + PROOF_BYTES, deadline)
    nonces = nonce + answer[:NONCE_BYTES]
    if not hmac.compare_digest(answer[NONCE_BYTES:], proof(token, b"client", nonces)):
        raise WireError("a peer does not know the token")
    send(connection, proof(token, b"server", nonces), deadline)


def proof(token: str, side: bytes, nonces: bytes) -> bytes:
    """The nonces make it worth nothing on another connection, the side nothing to the other end."""
    return hmac.digest(token.encode(), side + nonces, "sha256")


def configure(connection: socket.socket) -> None:
    """Small messages go at once; an idle connection whose other end has vanished is closed within half a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send_request(connection: socket.socket, request: Request) -> None:
    key = request.key.encode()
    if not KEY.fullmatch(key):
        raise WireError(f"share {request.key!r}: a key is 1 to 64 letters, digits, _ and -")
    sizes = (request.step, request.share_bytes, request.notes_bytes)
    send(connection, REQUEST.pack(VERBS.index(request.verb), key, *sizes), time.monotonic() + HEAD_S)


def receive_request(connection: socket.socket) -> Request | None:
    """None where the client has closed between two requests. Raises OSError, WireError for fields out of range."""
    connection.settimeout(IDLE_S)
    first = connection.recv(1)
    if not first:
        return None
    head = first + receive(connection, REQUEST.size - 1, time.monotonic() + HEAD_S)
    verb, padded, step, share_bytes, notes_bytes = REQUEST.unpack(head)
    key = padded.rstrip(b"\0")
    if verb >= len(VERBS) or not KEY.fullmatch(key):
        raise WireError("a request of an unknown verb, or for a share of no valid name")
    payload = (share_bytes, notes_bytes)
    fits = share_bytes > 0 and 0 < notes_bytes <= slots.NOTES_BYTES if VERBS[verb] == "put" else payload == (0, 0)
    if step < 0 or not fits:
        raise WireError(f"{VERBS[verb]} of step {step}, {share_bytes} bytes, {notes_bytes} of notes: out of range")
    return Request(VERBS[verb], key.decode(), step, share_bytes, notes_bytes)


def send_answer(connection: socket.socket, answer: Answer) -> None:
    problem = answer.problem.encode()[:200]
    head = ANSWER.pack(bool(problem), problem, answer.share_bytes, answer.notes_bytes)
    send(connection, head, time.monotonic() + HEAD_S)


def receive_answer(connection: socket.socket, wait_s: float = HEAD_S) -> Answer:
    """Raises OSError, WireError with the server's words where it refuses."""
    head = receive(connection, ANSWER.size, time.monotonic() + wait_s)
    refused, problem, share_bytes, notes_bytes = ANSWER.unpack(head)
    if refused:
        raise WireError(problem.rstrip(b"\0").decode(errors="replace"))
    return Answer("", share_bytes, notes_bytes)


def send(connection: socket.socket, data: bytes | bytearray | memoryview, deadline: float) -> None:
    view = memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        connection.settimeout(seconds_left(deadline))
        connection.sendall(view[start : start + CHUNK_BYTES])


def receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray(size)
    receive_into(connection, memoryview(data), deadline)
    return bytes(data)


def receive_into(connection: socket.socket, view: memoryview, deadline: float) -> None:
    """deadline: of time.monotonic(), for all of it. Raises OSError."""
    done = 0
    while done < len(view):
        connection.settimeout(seconds_left(deadline))
        got = connection.recv_into(view[done:], min(CHUNK_BYTES, len(view) - done))
        if not got:
            raise WireError(f"the other end closed after {done} of {len(view)} bytes")
        done += got


def seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("a message was not complete in time")
    return min(left, STALL_S)


def put(connection: socket.socket, address: Address, key: str, step: int, share: memoryview, notes: bytes) -> None:
    """Returns once the keeper at the other end holds the share whole. Raises OSError."""
    try:
        send_request(connection, Request("put", key, step, len(share), len(notes)))
        receive_answer(connection, STALL_S)
        deadline = time.monotonic() + TRANSFER_S
        send(connection, share, deadline)
        send(connection, notes, deadline)
        receive_answer(connection, STALL_S)
    except WireError as error:
        raise WireError(f"snapshot of step {step} was not taken by {address.ip}: {error}") from error


def get(address: Address, key: str, step: int, share_bytes: int) -> tuple[bytearray, Any]:
    """A share of that size and its notes out of another host's memory. Raises OSError, ValueError for broken notes."""
    with connect(address) as connection:
        try:
            send_request(connection, Request("get", key, step))
            answer = receive_answer(connection)
            if answer.share_bytes != share_bytes or not 0 < answer.notes_bytes <= slots.NOTES_BYTES:
                raise WireError(f"it is of {answer.share_bytes} bytes, {answer.notes_bytes} of notes")
            share, notes = bytearray(share_bytes), bytearray(answer.notes_bytes)
            deadline = time.monotonic() + TRANSFER_S
            receive_into(connection, memoryview(share), deadline)
            receive_into(connection, memoryview(notes), deadline)
            receive_answer(connection)
        except WireError as error:
            raise WireError(f"snapshot of step {step} is not at {address.ip}: {error}") from error
    return share, json.loads(notes)


def drop(address: Address, key: str, step: int) -> None:
    """Has another host give up its copy of a share, which was found to be damaged. Raises OSError."""
    with connect(address) as connection:
        send_request(connection, Request("drop", key, step))
        receive_answer(connection)
