"""Snapshots from host to host over TCP: a client sends a line of JSON, then bytes; the server answers alike. No JAX."""

import json
import socket
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60.0  # of one send or receive; a peer that is gone is noticed at once
CHUNK_BYTES = 1 << 20


class WireError(ConnectionError):
    """The other end is gone, or does not hold what was asked for."""


@dataclass(frozen=True)
class Address:
    """Where a host's keeper listens, and the word it wants to hear: the network is shared with strangers."""

    ip: str
    port: int
    token: str


@dataclass(frozen=True)
class Source:
    """Where a share can be read: slots in this host's memory, or another host's keeper."""

    path: str | None
    address: Address | None


def connect(address: Address) -> socket.socket:
    connection = socket.create_connection((address.ip, address.port), timeout=TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def send(connection: socket.socket, head: dict[str, Any], *parts: bytes | memoryview) -> None:
    line = json.dumps(head).encode()
    connection.sendall(len(line).to_bytes(4, "little") + line)
    for part in parts:
        connection.sendall(part)


def receive_head(connection: socket.socket) -> dict[str, Any] | None:
    """None where the other end has closed between two messages."""
    first = connection.recv(4)
    if not first:
        return None
    size = bytearray(4)
    size[: len(first)] = first
    receive_into(connection, memoryview(size)[len(first) :])
    line = bytearray(int.from_bytes(size, "little"))
    receive_into(connection, memoryview(line))
    head = json.loads(line)
    assert isinstance(head, dict)
    return head


def receive_into(connection: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = connection.recv_into(view[done:], min(CHUNK_BYTES, len(view) - done))
        if not got:
            raise WireError(f"the other end closed after {done} of {len(view)} bytes")
        done += got


def put(connection: socket.socket, address: Address, key: str, step: int, share: memoryview, notes: bytes) -> None:
    """Returns once the keeper at the other end holds the share whole. Raises OSError."""
    head = {"verb": "put", "token": address.token, "key": key, "step": step, "bytes": len(share), "notes": len(notes)}
    send(connection, head, share, notes)
    answer = receive_head(connection)
    if answer is None or "error" in answer:
        raise WireError(f"snapshot of step {step} was not taken: {answer}")


def get(address: Address, key: str, step: int) -> tuple[bytearray, Any]:
    """A share and its notes out of another host's memory. Raises OSError."""
    with connect(address) as connection:
        send(connection, {"verb": "get", "token": address.token, "key": key, "step": step})
        answer = receive_head(connection)
        if answer is None or "error" in answer:
            raise WireError(f"snapshot of step {step} is not at {address.ip}: {answer}")
        share, notes = bytearray(answer["bytes"]), bytearray(answer["notes"])
        receive_into(connection, memoryview(share))
        receive_into(connection, memoryview(notes))
        return share, json.loads(notes)
