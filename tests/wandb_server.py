"""A wandb server on loopback that records what the real client sends: enough of its GraphQL and of its file stream for
`wandb.init`, a resume and `wandb sync`. It keeps lines as wandb's own does: at the offset that the client names.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY, PROJECT = "team", "gemma-2"
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class Runs:
    """By run id: each file of the stream as its lines."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, list[str]]] = {}
        self.url = ""

    def history(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[run].get(HISTORY, [])]

    def steps(self, run: str, name: str = "loss", axis: str = "step") -> list[int]:
        return [row[axis] for row in self.history(run) if name in row]

    def take(self, run: str, sent: dict[str, Any]) -> None:
        there = self.files.setdefault(run, {})
        for name, part in (sent.get("files") or {}).items():
            lines, offset = there.setdefault(name, []), part.get("offset", 0)
            if name == SUMMARY:
                there[name] = part["content"]
                continue
            lines[offset : offset + len(part["content"])] = part["content"]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = str(variables.get("name") or variables.get("run") or variables.get("runName") or "")
        project = {"name": PROJECT, "entity": {"name": ENTITY}}
        if "viewer" in query:
            who = {"id": "1", "entity": ENTITY, "username": "me", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": who, "serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}}}
        if "upsertBucket" in query:
            new = run not in self.files
            self.files.setdefault(run, {})
            bucket = {"id": run, "name": run, "displayName": run, "project": project, "config": "{}"}
            bucket |= {"historyLineCount": len(self.files[run].get(HISTORY, []))}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables.get("files", [])]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "historyLineCount" in query:  # what a resume asks
            return {"model": {"bucket": self.bucket(run) if run in self.files else None}}
        return {}

    def bucket(self, run: str) -> dict[str, Any]:
        files = self.files[run]
        lines, events = files.get(HISTORY, []), files.get("wandb-events.jsonl", [])
        return {
            "name": run,
            "historyLineCount": len(lines),
            "eventsLineCount": len(events),
            "logLineCount": len(files.get("output.log", [])),
            "historyTail": json.dumps(lines[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "summaryMetrics": files.get(SUMMARY, ["{}"])[-1],
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }


class Handler(BaseHTTPRequestHandler):
    runs: Runs

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            self.runs.take(self.path.split("/")[-2], json.loads(body))
        if self.path != "/graphql":  # what it sends about itself is not looked at
            self.reply({})
        else:
            said = json.loads(body)
            self.reply({"data": self.runs.answer(said.get("query", ""), said.get("variables") or {})})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply({})

    def reply(self, found: dict[str, Any]) -> None:
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Runs]:
    """What it has recorded, and its address."""
    runs = Runs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Recording", (Handler,), {"runs": runs}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        runs.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield runs
    finally:
        server.shutdown()
        server.server_close()
