"""What a peer can do to a keeper over its port: nothing, unless it knows the token, and then no harm.

A keeper of its own process, whose memory and threads are seen from outside; raw sockets against it.
"""

import contextlib
import hmac
import json
import re
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gemma.memory import server, slots, wire
from gemma.memory.wire import Address

BYTES = 100_000
GROWTH_KB = 30_000  # of a keeper that nobody has given a share to
ASK_S = 1.0  # the controller gives keepers so long to answer
SERVER = """
import secrets, sys, time
from gemma.memory import server, wire
wire.HANDSHAKE_S = float(sys.argv[1])
wire.STALL_S = float(sys.argv[2])
token = secrets.token_hex(16)
here = server.open_server("127.0.0.1", token)
print(here.address.port, token, flush=True)
for line in sys.stdin:  # keys whose steps are asked for
    memory = here.memories.get(line.strip())
    print([step for step, _ in server.held_steps(memory)] if memory else [], flush=True)
"""


@dataclass(frozen=True)
class Far:
    """A server of shares in another process."""

    process: subprocess.Popen[str]
    address: Address

    def status(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        assert found
        return int(found[1])

    def steps(self, key: str) -> list[int]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(key + "\n")
        self.process.stdin.flush()
        steps: list[int] = json.loads(self.process.stdout.readline())
        return steps


@contextlib.contextmanager
def started(handshake_s: float, stall_s: float = 10.0) -> Iterator[Far]:
    """Fails where it has said anything of an exception."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(handshake_s), str(stall_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        try:
            port, token = process.stdout.readline().split()
            yield Far(process, Address("127.0.0.1", int(port), token))
            assert process.poll() is None
        finally:
            process.kill()
        assert process.stderr.read() == ""


@pytest.fixture
def far() -> Iterator[Far]:
    with started(10.0) as found:
        yield found


def raw(far: Far) -> socket.socket:
    return socket.create_connection((far.address.ip, far.address.port), timeout=20.0)


def put(address: Address, key: str, step: int, size: int = BYTES) -> None:
    with wire.connect(address) as connection:
        wire.put(connection, address, key, step, memoryview(bytes([step % 251]) * size), b'{"attempt": 1}')


def closed_within(connection: socket.socket, limit_s: float) -> bool:
    """Whether the other end closes, after whatever it says before."""
    connection.settimeout(limit_s)
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            try:
                if not connection.recv(65536):
                    return True
            except TimeoutError:
                return False
        return False
    return True


def wait(ready: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


STRANGE = {
    "a length of four gigabytes": b"\xff" * 4,
    "much of it": b"\xff" * 4_000_000,
    "zeros": b"\0" * 100_000,
    "an object of JSON": b'\x13\0\0\0{"verb": "put", "token": 5}' + b" " * 100,
    "nested deeply": b"[" * 100_000,
    "a huge number": b"9" * 100_000,
    "no number": b"NaN" + b" " * 100,
    "a token that is not ASCII": "größe".encode() * 100,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 64,
}


@pytest.mark.parametrize("said", STRANGE.values(), ids=STRANGE)
def test_who_does_not_know_the_token_is_cut_off_and_takes_no_memory(far: Far, said: bytes) -> None:
    put(far.address, "a", 1)
    before, threads = far.status("VmRSS"), far.status("Threads")
    connections = [raw(far) for _ in range(8)]
    for connection in connections:
        with contextlib.suppress(ConnectionError):
            connection.sendall(said)
    if len(said) >= 64:
        assert all(closed_within(connection, 5.0) for connection in connections)
    time.sleep(0.2)
    assert far.status("VmRSS") - before < GROWTH_KB
    for connection in connections:
        connection.close()
    wait(lambda: far.status("Threads") <= threads, 5.0)
    assert far.steps("a") == [1]


def test_the_proof_of_one_connection_is_worth_nothing_on_another(far: Far) -> None:
    with raw(far) as connection:
        nonces = wire.receive(connection, 32, time.monotonic() + 5) + secrets.token_bytes(32)
        proof = nonces[32:] + wire.proof(far.address.token, b"client", nonces)
        connection.sendall(proof)
        assert len(wire.receive(connection, 32, time.monotonic() + 5)) == 32
    with raw(far) as connection:
        connection.sendall(proof)
        assert closed_within(connection, 5.0)


def test_a_client_speaks_to_nobody_that_does_not_know_the_token() -> None:
    """The port of a keeper that is gone may be another's by now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard: list[bytes] = []

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(32))
                heard.append(connection.recv(1000))
                connection.sendall(hmac.digest(b"guess", heard[0], "sha256"))
                heard.append(connection.recv(1000))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="token"):
            put(Address("127.0.0.1", listener.getsockname()[1], "secret"), "a", 1)
        thread.join(10.0)
    assert len(heard[0]) == 64
    assert heard[1] == b""


def test_many_silent_connections_keep_nobody_out_and_hold_few_threads(far: Far) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(raw(far)) for _ in range(400)]
        put(far.address, "a", 1)
        wait(lambda: far.status("Threads") <= server.STRANGERS + 8, 5.0)
        assert far.status("VmRSS") < 200_000
        assert closed_within(silent[0], 5.0)
        put(far.address, "a", 2)
    assert far.steps("a") == [1, 2]


@pytest.mark.parametrize("said", [b"", b"x"], ids=["silent", "a byte at a time"])
def test_a_stranger_has_so_long_to_say_who_it_is_however_it_spreads_it(said: bytes) -> None:
    with started(1.0) as far, raw(far) as connection:
        begun = time.monotonic()
        connection.settimeout(0.1)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 10.0:
                connection.sendall(said)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(64):
                        break
        assert time.monotonic() - begun < 4.0


def test_more_clients_than_there_may_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLIENTS", 3)
    here = server.open_server("127.0.0.1", "secret")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(wire.connect(here.address))
        wait(lambda: len(here.clients) == 3, 5.0)
        with pytest.raises(OSError):
            put(here.address, "a", 1)
    wait(lambda: not here.clients, 5.0)
    put(here.address, "a", 1)


def request(verb: int = 0, key: bytes = b"a", step: int = 2, share_bytes: int = BYTES, notes_bytes: int = 14) -> bytes:
    return struct.pack("<B64sqqq", verb, key, step, share_bytes, notes_bytes)


ABSURD = {
    "verb": request(verb=3),
    "no key": request(key=b""),
    "key of any bytes": request(key=b"\xff\0/../"),
    "key that is a path": request(key=b"../x"),
    "step below zero": request(step=-5),
    "share below zero": request(share_bytes=-1),
    "share of nothing": request(share_bytes=0),
    "share of exabytes": request(key=b"b", share_bytes=2**62),
    "largest number": request(key=b"b", share_bytes=2**63 - 1),
    "another size than the share is": request(share_bytes=BYTES + 1),
    "another share of another size": request(key=b"b", share_bytes=2 * BYTES),
    "notes below zero": request(notes_bytes=-1),
    "no notes": request(notes_bytes=0),
    "notes of gigabytes": request(notes_bytes=2**40),
    "notes that do not fit": request(notes_bytes=slots.NOTES_BYTES + 1),
    "payload of a get": request(verb=1),
    "a get of nothing": request(verb=1, key=b"c", share_bytes=0, notes_bytes=0),
    "a drop of nothing": request(verb=2, key=b"c", share_bytes=0, notes_bytes=0),
}


@pytest.mark.parametrize("head", ABSURD.values(), ids=ABSURD)
def test_with_the_token_an_absurd_request_is_refused_and_takes_no_memory(far: Far, head: bytes) -> None:
    put(far.address, "a", 1)
    before = far.status("VmRSS")
    with wire.connect(far.address) as connection:
        connection.sendall(head)
        with pytest.raises(wire.WireError):
            wire.receive_answer(connection)
    assert far.status("VmRSS") - before < GROWTH_KB
    assert (far.steps("a"), far.steps("b")) == ([1], [])
    put(far.address, "a", 2)


NOTES = {
    "no JSON": b"x" * 14,
    "no object": b"[1]",
    "no attempt": b'{"a": 1}',
    "attempt of another type": b'{"attempt": "1"}',
    "attempt that is true": b'{"attempt": true}',
    "attempt below zero": b'{"attempt": -1}',
    "NaN": b'{"attempt": NaN}',
    "not ASCII": b'{"attempt": 1\xff}',
    "nested deeply": b"[" * 100_000,
    "a number of many digits": b'{"attempt": ' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("notes", NOTES.values(), ids=NOTES)
def test_notes_that_nobody_could_read_are_refused(far: Far, notes: bytes) -> None:
    put(far.address, "a", 1)
    with wire.connect(far.address) as connection:
        with pytest.raises(wire.WireError, match="step 2 was not taken"):
            wire.put(connection, far.address, "a", 2, memoryview(bytes(BYTES)), notes)
        wire.put(connection, far.address, "a", 3, memoryview(bytes(BYTES)), b'{"attempt": 1}')
    assert far.steps("a") == [1, 3]


@pytest.mark.parametrize("size", [1, 50, 88])
def test_a_request_cut_short_ends_its_thread(far: Far, size: int) -> None:
    put(far.address, "a", 1)
    threads = far.status("Threads")
    with wire.connect(far.address) as connection:
        connection.sendall(request()[:size])
    wait(lambda: far.status("Threads") <= threads, 5.0)
    assert far.steps("a") == [1]


def test_too_many_shares_are_refused(far: Far) -> None:
    for index in range(server.SHARES):
        put(far.address, f"s{index}", 1)
    with pytest.raises(wire.WireError, match=f"{server.SHARES} shares"):
        put(far.address, "more", 1)
    put(far.address, "s0", 2)


def test_a_wrong_token_puts_gets_and_drops_nothing(far: Far) -> None:
    put(far.address, "a", 1)
    stranger = replace(far.address, token="0" * 32)
    for attempt in (
        lambda: put(stranger, "a", 2),
        lambda: wire.get(stranger, "a", 1, BYTES),
        lambda: wire.drop(stranger, "a", 1),
    ):
        with pytest.raises(OSError):
            attempt()
    assert far.steps("a") == [1]


def test_a_share_of_another_size_is_not_read(far: Far) -> None:
    put(far.address, "a", 1)
    with pytest.raises(wire.WireError, match=f"{BYTES} bytes"):
        wire.get(far.address, "a", 1, BYTES // 2)


def half_sent(address: Address, key: str, step: int) -> socket.socket:
    """A sender that falls silent amid a share, as one does whose machine loses its power: no FIN."""
    connection = wire.connect(address)
    wire.send_request(connection, wire.Request("put", key, step, BYTES, 14))
    wire.receive_answer(connection)
    connection.sendall(bytes(BYTES // 2))
    return connection


def within(limit_s: float, function: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(limit_s)
    assert found, f"not done in {limit_s} s"
    return found[0]


def test_while_a_sender_is_silent_what_is_held_can_be_listed_read_and_given_up(far: Far) -> None:
    put(far.address, "a", 10)
    with half_sent(far.address, "a", 11):
        assert within(ASK_S, lambda: far.steps("a")) == [10]
        share, _ = wire.get(far.address, "a", 10, BYTES)
        assert bytes(share) == bytes([10]) * BYTES
        within(ASK_S, lambda: wire.drop(far.address, "a", 10))
        assert far.steps("a") == []


def test_another_sender_takes_the_place_of_a_silent_one(far: Far) -> None:
    with half_sent(far.address, "a", 11) as silent:
        within(ASK_S, lambda: put(far.address, "a", 12))
        assert closed_within(silent, 5.0)
    assert far.steps("a") == [12]
    assert bytes(wire.get(far.address, "a", 12, BYTES)[0]) == bytes([12]) * BYTES


def test_a_silent_sender_is_given_up_within_the_stall_limit() -> None:
    with started(10.0, 1.0) as far, half_sent(far.address, "a", 11) as silent:
        begun = time.monotonic()
        assert closed_within(silent, 5.0)
        assert time.monotonic() - begun < 4.0


def test_a_slow_reader_holds_up_nobody_and_hears_if_its_share_was_written_over() -> None:
    """Of a share that does not fit into the sockets' buffers."""
    size = 64 << 20
    here = server.open_server("127.0.0.1", "secret")
    for step in range(1, slots.SLOTS + 1):
        put(here.address, "a", step, size)
    with wire.connect(here.address) as slow:
        wire.send_request(slow, wire.Request("get", "a", 1))
        answer = wire.receive_answer(slow)
        within(ASK_S, lambda: server.held_steps(here.memories["a"]))
        within(20.0, lambda: put(here.address, "a", 5, size))
        deadline = time.monotonic() + 30.0
        wire.receive(slow, answer.share_bytes + answer.notes_bytes, deadline)
        with pytest.raises(wire.WireError, match="given up meanwhile"):
            wire.receive_answer(slow)
