"""Servers on this machine for tests: HTTP with faults on demand, and moto's S3."""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_PIECE = 8 << 10


@dataclass(frozen=True)
class Fault:
    """What a server does with one request instead of answering it: another `status` (0: none at all), or the body only
    up to its byte `after`, and then the connection `cut` (as by a reset, if `reset`) or silence; or the body so slowly
    that it takes `slow_s`."""

    status: int | None = None
    after: int | None = None
    cut: bool = True
    reset: bool = False
    slow_s: float = 0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    start: int
    end: int  # of what was asked for
    header: dict[str, str]


class Server:
    """Serves `objects` by name at `url`; `fault` says what happens to each request."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.ranges = True
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.connections = 0
        self.released = threading.Event()  # ends all silence
        self._versions = count(1)
        self._lock = threading.Lock()
        self._sent: dict[str, np.ndarray] = {}
        self.start(port=0)
        self.host = f"127.0.0.1:{self._http.server_port}"
        self.url = f"http://{self.host}"

    def put(self, name: str, content: bytes) -> str:
        """Makes it an object, of a version of its own; its URL."""
        self.objects[name], self.etags[name] = content, f"v{next(self._versions)}"
        self._sent[name] = np.zeros(len(content), np.uint16)
        return f"{self.url}/{name}"

    def once(self, *faults: Fault | None) -> None:
        """These, one after the other, for requests of more than a byte; then none."""
        left = iter(faults)
        self.fault = lambda request: next(left, None) if request.end - request.start > 1 else None

    @property
    def sent(self) -> int:
        """Bytes of objects."""
        return sum(int(times.sum()) for times in self._sent.values())

    @property
    def sent_again(self) -> int:
        """Bytes of objects that had been sent before; without the first of each, by which its size is asked."""
        return sum(int(times[1:].clip(1).sum()) - len(times[1:]) for times in self._sent.values() if len(times))

    def forget(self) -> None:
        """Counts from zero."""
        self.requests.clear()
        self.faults.clear()
        for times in self._sent.values():
            times[:] = 0

    def note_sent(self, name: str, start: int, end: int) -> None:
        with self._lock:
            self._sent[name][start:end] += 1

    def choose(self, request: Request) -> Fault:
        with self._lock:
            fault = self.fault(request)
            self.requests.append(request)
            if fault:
                self.faults.append(fault)
        return fault or Fault()

    def start(self, port: int | None = None) -> None:
        """Also again, after `stop`."""
        address = ("127.0.0.1", self._http.server_port if port is None else port)
        self._http = _Http(address, type("Handler", (_Handler,), {"server_of": self}))
        self._http.server_of = self
        self.stopped = False
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more, and open connections break off."""
        self.stopped = True
        self._http.shutdown()
        self._http.server_close()

    def close(self) -> None:
        self.released.set()
        self.stop()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    server_of: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: readers break connections off."""

    def get_request(self) -> Any:
        self.server_of.connections += 1
        return super().get_request()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_of: Server

    def do_GET(self) -> None:
        server, name = self.server_of, unquote(self.path.partition("?")[0][1:])
        content = server.objects.get(name)
        asked = _RANGE.match(self.headers.get("Range", "")) if server.ranges else None
        size = len(content or b"")
        start = int(asked[1]) if asked else 0
        end = min(int(asked[2]) + 1, size) if asked and asked[2] else size
        fault = server.choose(Request(self.command, self.path, start, end, dict(self.headers)))
        if fault.status == 0 or server.stopped:
            self._break(fault)
            return
        if content is None or fault.status or (asked and start >= size):
            self._head(fault.status or (404 if content is None else 416), 0)
            return
        more = {"Content-Range": f"bytes {start}-{end - 1}/{size}"} if asked else {}
        self._head(206 if asked else 200, end - start, {"ETag": f'"{server.etags[name]}"', **more})
        if self.command == "HEAD":
            return
        stop = end if fault.after is None else min(end, start + fault.after)
        with suppress(ConnectionError):  # a reader that does not want more
            for at in range(start, stop, _PIECE):
                if server.stopped:
                    self.close_connection = True
                    return
                upto = min(at + _PIECE, stop)
                server.released.wait(fault.slow_s * (upto - at) / (end - start)) if fault.slow_s else None
                server.note_sent(name, at, upto)
                self.wfile.write(content[at:upto])
        if stop < end:
            self._break(fault)

    do_HEAD = do_GET

    def _head(self, status: int, size: int, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(size), "Accept-Ranges": "bytes", **(more or {})}.items():
            if name != "Accept-Ranges" or self.server_of.ranges:
                self.send_header(name, value)
        self.end_headers()

    def _break(self, fault: Fault) -> None:
        self.close_connection = True
        if not fault.cut:
            self.server_of.released.wait()
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once: what comes after a handler would end it in order first

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def http_server() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """moto's S3, named by the environment as any S3 is; its endpoint. It has the bucket `shards`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        # moto remembers what was in another server of this process.
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        boto3.client("s3").create_bucket(Bucket="shards")
        yield endpoint
    finally:
        server.stop()
