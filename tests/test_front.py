"""HTTP without hosts: a stand-in for devices drives the router. Bad requests, bad clients, keys, a full queue."""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma.batching import schedule
from orchestrator.config import Config
from orchestrator.serving import front
from orchestrator.serving import router as routers
from orchestrator.serving.router import Replica, Router
from tests.test_config import config_of
from tests.test_schedule import LIMITS, Device
from tests.test_serve import asked

GOOD = {"model": "gemma-2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


def config(**changes: Any) -> Config:
    from launch.weights import defaults
    from orchestrator import config as configs

    made = configs.from_container(defaults(["wandb.mode=disabled"], "serve"))
    assert made.serve is not None
    return replace(made, serve=replace(made.serve, **({"port": 0} | changes)))


@contextlib.contextmanager
def serving(steps_s: float = 0.0, slots: int = 4, **changes: Any) -> Iterator[tuple[str, Router]]:
    """Its address. steps_s: that a plan takes."""
    of = config(**changes)
    assert of.serve is not None
    router, over = Router(of.serve.queue), threading.Event()
    limits = replace(LIMITS, slots=slots, global_pages=400, local_pages=200)
    with front.served(of, router) as address:
        replica = routers.open_replica(router, [limits])
        thread = threading.Thread(target=drive, args=(router, replica, over, steps_s), daemon=True)
        thread.start()
        try:
            yield address, router
        finally:
            over.set()
            thread.join(10)


def drive(router: Router, replica: Replica, over: threading.Event, steps_s: float) -> None:
    """What a replica's thread does, with a stand-in for its devices."""
    (batch,) = replica.batches
    device = Device(batch.limits)
    while not over.is_set():
        routers.take(router, replica)
        plan = schedule.plan(batch, 2, 16)
        if plan.empty:
            replica.arrived.wait(0.01)
            continue
        time.sleep(steps_s)
        if not over.is_set():
            routers.deliver(router, replica, schedule.take_answer(batch, device.do(plan)))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Router]]:
    with serving() as found:
        yield found


def post(address: str, body: Any, **headers: str) -> tuple[int, Any]:
    return asked(address, "/v1/chat/completions", json.dumps(body).encode(), **headers)


def idle(router: Router) -> bool:
    nothing = not router.requests and not router.open and not any(router.waiting) and not router.places
    return nothing and all(schedule.idle(batch) for replica in router.replicas for batch in replica.batches)


def wait_idle(router: Router) -> None:
    deadline = time.monotonic() + 20
    while not idle(router):
        assert time.monotonic() < deadline, (router.open, router.requests)
        time.sleep(0.01)


def test_two_thousand_spoilt_requests_are_each_a_clear_4xx_and_leave_nothing(server: tuple[str, Router]) -> None:
    """A good request with a piece cut out, doubled or changed, or a value of another kind."""
    address, router = server
    rng = random.Random(0)
    raw = json.dumps(GOOD).encode()
    values: list[Any] = [None, True, -1, 0, 1e308, "x", [], {}, [[[]]], {"a": 1}, "\ud800", 2**80, ""]
    keys = [*GOOD, "n", "stop", "temperature", "logit_bias", "stream_options", "seed", "top_logprobs", "frob"]
    codes = set()
    for _ in range(1000):
        at, size = rng.randrange(len(raw)), rng.randint(1, 8)
        spoilt = raw[:at] + rng.choice([b"", raw[at : at + size] * 2, rng.randbytes(size)]) + raw[at + size :]
        code, found = asked(address, "/v1/chat/completions", spoilt)
        codes.add(code)
        assert code == 200 or found["error"]["message"], spoilt
        code, found = post(address, GOOD | {rng.choice(keys): rng.choice(values)})
        codes.add(code)
        assert code == 200 or found["error"]["message"]
    assert codes <= {200, 400, 404}
    assert {400, 404} <= codes
    wait_idle(router)


def test_what_is_no_route_or_method_is_said_in_openai_s_form(server: tuple[str, Router]) -> None:
    address, _ = server
    for path, body, status in (("/v1/nope", None, 404), ("/v1/chat/completions", None, 405), ("/v1/models", b"", 405)):
        code, found = asked(address, path, body)
        assert code == status
        assert path in found["error"]["message"]


def test_slow_and_half_open_clients_hold_up_nobody(server: tuple[str, Router]) -> None:
    address, router = server
    host, port = address.removeprefix("http://").split(":")
    raw = json.dumps(GOOD).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    opened = []
    for sent in (b"", head[:10], head, head + raw[:5], b"\x00" * 2000, head.replace(b"POST", b"POST" * 3000)):
        for _ in range(30):
            one = socket.create_connection((host, int(port)))
            one.sendall(sent)
            opened.append(one)
    started = time.monotonic()
    assert post(address, GOOD)[0] == 200
    assert time.monotonic() - started < 2
    for one in opened[::2]:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_WR)
    assert post(address, GOOD)[0] == 200
    for one in opened:
        one.close()
    wait_idle(router)


def test_a_full_queue_is_429_with_a_time_to_come_again() -> None:
    with serving(steps_s=0.05, queue=3) as (address, router):
        codes: list[int] = []
        threads = [threading.Thread(target=lambda: codes.append(post(address, GOOD)[0])) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 3
        wait_idle(router)
        assert post(address, GOOD)[0] == 200


def test_while_no_replica_stands_new_requests_are_503_and_running_ones_wait() -> None:
    with serving(steps_s=0.02) as (address, router):
        found: list[int] = []
        running = threading.Thread(target=lambda: found.append(post(address, GOOD | {"max_tokens": 40})[0]))
        running.start()
        time.sleep(0.1)
        (replica,) = router.replicas
        router.replicas.clear()
        assert asked(address, "/health")[0] == 503
        code, said = post(address, GOOD)
        assert (code, said["error"]["type"]) == (503, "server_error")
        router.replicas.append(replica)
        running.join()
        assert found == [200]
        assert asked(address, "/health")[0] == 200


def test_everybody_is_told_when_no_hosts_will_come_any_more() -> None:
    with serving(steps_s=0.05) as (address, router):
        whole: list[tuple[int, Any]] = []
        asking = threading.Thread(target=lambda: whole.append(post(address, GOOD | {"max_tokens": 40})))
        asking.start()
        time.sleep(0.2)
        routers.give_up(router, "the server has stopped")
        asking.join()
        ((code, found),) = whole
        assert (code, found["error"]["message"]) == (503, "the server has stopped")


def test_keys_are_compared_whole_and_bad_key_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nright\n\n")
    with serving(api_keys=str(tmp_path / "keys")) as (address, _):
        cases = {
            "Bearer right": 200,
            "bearer right": 200,
            "Bearer righ": 401,
            "right": 401,
            "Bearer # ours": 401,
            "": 401,
        }
        for header, status in cases.items():
            code, found = post(address, GOOD, Authorization=header)
            assert code == status, header
            assert status == 200 or found["error"]["code"] == "invalid_api_key"
    for content in ("", "# none\n"):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(Exception, match="holds no key"), serving(api_keys=str(tmp_path / "keys")):
            pass
    with pytest.raises(Exception, match="cannot be read"), serving(api_keys=str(tmp_path / "absent")):
        pass


def test_beyond_loopback_keys_are_needed_and_a_taken_port_is_named() -> None:
    with pytest.raises(Exception, match="serve.host=0.0.0.0: reachable from elsewhere, so it needs serve.api_keys"):
        config(host="0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Exception, match=f"serve.port={port}: Address already in use"), serving(port=port):
            pass


def test_pages_of_configured_origins_may_ask_and_no_others() -> None:
    import urllib.request

    def allowed(address: str, origin: str) -> str | None:
        request = urllib.request.Request(f"{address}/v1/models", headers={"Origin": origin})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers.get("access-control-allow-origin")

    with serving(cors=("https://example.org",)) as (address, _):
        assert allowed(address, "https://example.org") == "https://example.org"
        assert allowed(address, "https://evil.example") is None
    with serving() as (address, _):
        assert allowed(address, "https://example.org") is None


def test_config_of_a_server_is_that_of_training_otherwise() -> None:
    assert config().optim == config_of().optim


def test_a_client_that_is_gone_before_its_answer_begins_leaves_nothing() -> None:
    with serving(steps_s=0.002) as (address, router):
        host, port = address.removeprefix("http://").split(":")
        for stream in (True, False):
            raw = json.dumps(GOOD | {"stream": stream, "max_tokens": 40}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
            for number in range(150):
                with socket.create_connection((host, int(port))) as gone:
                    gone.sendall(head + raw)
                    if number % 2:
                        time.sleep(0.001 * (number % 7))
        wait_idle(router)


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_vanished_client_asked_for_is_cancelled_and_not_finished(stream: bool) -> None:
    with serving(steps_s=0.03) as (address, router):
        host, port = address.removeprefix("http://").split(":")
        raw = json.dumps(GOOD | {"stream": stream, "max_tokens": 60}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(head + raw)
            while not router.requests:
                time.sleep(0.005)
            (request,) = router.requests.values()
            time.sleep(0.1)
        wait_idle(router)
        assert [one.ended for one in request.sequences] == ["cancelled"]
