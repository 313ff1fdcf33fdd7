"""A metadata server as Google's machines have one, on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Machine:
    """host: the server's address and port. says: by path, what it answers."""

    host: str
    says: dict[str, str] = field(
        default_factory=lambda: {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
    )


@contextmanager
def serve() -> Iterator[Machine]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = machine.says.get(self.path.removeprefix("/computeMetadata/v1/"))
            code = 403 if self.headers["Metadata-Flavor"] != "Google" else 404 if said is None else 200
            self.send_response(code)
            self.end_headers()
            self.wfile.write((said or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    machine = Machine(f"127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield machine
    finally:
        server.shutdown()
        server.server_close()
