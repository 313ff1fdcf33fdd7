"""What is no Ray cluster is refused within seconds, whatever it is."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gemma.config import ConfigError
from orchestrator.slices import existing


@contextmanager
def served(server: socketserver.BaseServer) -> Iterator[int]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]  # type: ignore[index]
    server.shutdown()
    server.server_close()


@contextmanager
def http() -> Iterator[int]:
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with served(HTTPServer(("127.0.0.1", 0), Quiet)) as port:
        yield port


@contextmanager
def closing() -> Iterator[int]:
    with served(socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)) as port:
        yield port


@contextmanager
def silent() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def nothing() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@contextmanager
def other_grpc() -> Iterator[int]:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait()


@pytest.mark.parametrize("what", [http, closing, silent, nothing, other_grpc])
def test_what_is_no_ray_cluster_is_refused_within_five_seconds(what) -> None:  # type: ignore[no-untyped-def]
    with what() as port:
        address, started = f"127.0.0.1:{port}", time.monotonic()
        said = rf"^cluster.address={address}: no Ray cluster answers there \(.+\)$"
        with pytest.raises(ConfigError, match=said), existing.connected(address):
            pass
        assert time.monotonic() - started < existing.CONNECT_TIMEOUT_S + 2
