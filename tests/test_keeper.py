"""A host's keeper, in this process: shares come and go over real sockets, processes are seen to end."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest

from gemma.memory import slots, wire
from gemma.memory.wire import Address
from orchestrator.hosts.keeper import Keeper
from orchestrator.hosts.memory import ASK_S
from orchestrator.hosts.witness import is_stopped

BYTES = 100_000


@pytest.fixture
def keeper() -> Keeper:
    return Keeper("127.0.0.1", math.inf)  # it would end this process


def share(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 255, BYTES, np.uint8)


def put(address: Address, key: str, step: int) -> None:
    with wire.connect(address) as connection:
        wire.put(connection, address, key, step, memoryview(share(step)), b'{"attempt": 1}')


def test_a_share_that_was_put_comes_back_to_the_bit(keeper: Keeper) -> None:
    put(keeper.address, "a", 7)
    got, notes = wire.get(keeper.address, "a", 7, BYTES)
    assert (bytes(got), notes) == (share(7).tobytes(), {"attempt": 1})


def test_the_inventory_names_each_share_and_its_steps(keeper: Keeper) -> None:
    for key, step in (("a", 1), ("a", 2), ("b", 2)):
        put(keeper.address, key, step)
    assert keeper.inventory().steps == {"a": ((1, 1), (2, 1)), "b": ((2, 1),)}


def half_sent(address: Address, step: int) -> socket.socket:
    """A sender that has sent half of a share."""
    connection = wire.connect(address)
    wire.send_request(connection, wire.Request("put", "a", step, BYTES, 14))
    wire.receive_answer(connection)
    connection.sendall(memoryview(share(step))[: BYTES // 2])
    return connection


def test_a_share_under_way_when_its_sender_dies_is_not_held(keeper: Keeper) -> None:
    put(keeper.address, "a", 1)
    half_sent(keeper.address, 2).close()
    time.sleep(0.2)
    assert keeper.inventory().steps == {"a": ((1, 1),)}


def test_a_sender_whose_machine_vanishes_holds_nothing_up(keeper: Keeper) -> None:
    """It sends no FIN: the keeper has only silence to go by, while the controller waits a second for an answer."""
    put(keeper.address, "a", 10)
    answers: list[Any] = []

    def ask() -> None:
        answers.append(keeper.inventory().steps)
        keeper.watch(os.getpid())
        keeper.go_back(10)
        answers.append(keeper.inventory().steps)

    with half_sent(keeper.address, 11) as silent:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ASK_S)
        assert answers == [{"a": ((10, 1),)}] * 2
        silent.settimeout(5.0)
        assert silent.recv(1) == b""  # the run has gone back: it is not waited for


def test_what_was_on_its_way_when_the_run_went_back_is_never_held(keeper: Keeper) -> None:
    put(keeper.address, "a", 1)
    with half_sent(keeper.address, 3) as late:
        keeper.go_back(1)
        with contextlib.suppress(OSError):
            late.sendall(memoryview(share(3))[BYTES // 2 :].tobytes() + b'{"attempt": 1}')
        with pytest.raises(OSError):
            wire.receive_answer(late)
    put(keeper.address, "a", 2)
    assert keeper.inventory().steps == {"a": ((1, 1), (2, 1))}
    assert bytes(wire.get(keeper.address, "a", 2, BYTES)[0]) == share(2).tobytes()


def test_a_step_that_is_not_held_is_refused_by_name(keeper: Keeper) -> None:
    with pytest.raises(wire.WireError, match="step 3"):
        wire.get(keeper.address, "a", 3, BYTES)


def test_a_process_of_the_host_opens_the_memory_by_its_path(keeper: Keeper) -> None:
    path = keeper.hold("a", BYTES)
    code = f"""
from pathlib import Path
from gemma.memory import slots
memory = slots.open_slots(Path({path!r}), {BYTES})
slot, view = slots.begin(memory, 4)
view[:] = bytes([9]) * {BYTES}
slots.commit(memory, slot, 4, b'{{"attempt": 2}}')
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert keeper.inventory().steps == {"a": ((4, 2),)}
    assert bytes(wire.get(keeper.address, "a", 4, BYTES)[0]) == bytes([9]) * BYTES


def test_going_back_drops_later_steps_of_every_share(keeper: Keeper) -> None:
    for key, step in (("a", 1), ("a", 2), ("b", 2)):
        put(keeper.address, key, step)
    keeper.go_back(1)
    assert keeper.inventory().steps == {"a": ((1, 1),), "b": ()}


def test_the_end_of_a_watched_process_is_timed(keeper: Keeper) -> None:
    process = subprocess.Popen(["sleep", "60"])
    keeper.watch(process.pid)
    assert process.pid not in keeper.inventory().deaths
    killed = time.time()
    process.kill()
    process.wait()
    time.sleep(0.2)
    assert keeper.inventory().deaths[process.pid] == pytest.approx(killed, abs=0.15)


def test_only_watched_processes_are_signalled(keeper: Keeper) -> None:
    assert not keeper.signal(os.getpid(), signal.SIGTERM)


def test_the_kernels_view_tells_a_stopped_process_from_one_that_waits(keeper: Keeper) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        time.sleep(0.1)
        waiting = keeper.threads(process.pid)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        assert [is_stopped("\n".join(threads)) for threads in (waiting, keeper.threads(process.pid))] == [False, True]
    finally:
        process.kill()
        process.wait()


def test_it_ends_when_nobody_uses_it() -> None:
    code = "from orchestrator.hosts.keeper import Keeper; import time; Keeper('127.0.0.1', 0.4); time.sleep(60)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert done.returncode == 0
    assert time.monotonic() - started < 20


def test_its_memory_ends_with_it() -> None:
    before = set(os.listdir("/dev/shm"))
    code = "from orchestrator.hosts.keeper import Keeper as K; k = K('127.0.0.1', 9.0); print(k.hold('a', 1 << 24))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    path = done.stdout.strip()
    assert path.startswith("/proc/")
    assert not os.path.exists(path)
    assert set(os.listdir("/dev/shm")) == before


def test_a_share_that_a_host_has_no_room_for_is_refused(keeper: Keeper) -> None:
    with pytest.raises(MemoryError, match="snapshots need 4503"):
        keeper.hold("a", 1 << 50)
    assert keeper.inventory().steps == {}


def test_memory_that_is_promised_and_not_yet_written_is_not_promised_again(keeper: Keeper) -> None:
    half = psutil.virtual_memory().available // 2 // slots.SLOTS
    keeper.hold("a", half)
    with pytest.raises(MemoryError):
        keeper.hold("b", half)
    keeper.hold("c", BYTES)
