"""Servers that W&B is told to log to, in every bad shape; and one that answers as much as a run needs to begin."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def silent() -> Iterator[str]:
    """Takes connections and never says a word."""
    held = []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:

        def accept() -> None:
            try:
                while True:
                    held.append(listening.accept()[0])
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def failing() -> Iterator[str]:
    """Answers 500."""
    with _served(lambda request, query: (500, {"error": "out of order"})) as url:
        yield url


@contextmanager
def unknown() -> Iterator[str]:
    yield "http://no-such-host.invalid"


@contextmanager
def dark_after_the_start() -> Iterator[str]:
    """Lets a run begin, then takes everything and says nothing."""
    end = threading.Event()
    bucket: dict[str, Any] = {
        "id": "UnVu", "displayName": "run", "sweepName": None, "historyLineCount": 0,
        "project": {"id": "UHJv", "name": "onecurve", "entity": {"id": "RW50", "name": "somebody"}},
    }  # fmt: skip

    def answer(path: str, query: str) -> tuple[int, Any]:
        if "UpsertBucket" in query:
            name = json.loads(query)["variables"]["name"]
            return 200, {"data": {"upsertBucket": {"bucket": {**bucket, "name": name}, "inserted": True}}}
        if "RunResumeStatus" in query:
            return 200, {"data": {"model": {**bucket["project"], "bucket": None}}}
        end.wait()
        return 500, {}

    with _served(answer) as url:
        yield url
        end.set()


@contextmanager
def _served(answer: Any) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, told = answer(self.path, body.decode("utf-8", "replace"))
            content = json.dumps(told).encode()
            with suppress(ConnectionError):  # not waited for
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
