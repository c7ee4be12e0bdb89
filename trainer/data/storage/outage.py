"""Servers that this process waits for: told once when the waiting begins, and once when they are back."""

from __future__ import annotations

import logging
import sys
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

log = logging.getLogger("onecurve")
_lock = threading.Lock()
_waited_for: dict[str, float] = {}  # since when


def waiting(url: str, reason: str, patience_s: float) -> None:
    """Some read of `url` does not go on."""
    server = _server(url)
    with _lock:
        if server in _waited_for:
            return
        _waited_for[server] = time.monotonic()
    _tell(f"waiting for {server} ({reason}), up to {patience_s:g} s (data.patience_s)")


def is_on() -> bool:
    """Whether something is waited for."""
    return bool(_waited_for)


def answered(url: str) -> None:
    """Something came from where `url` is."""
    if not _waited_for:
        return
    server = _server(url)
    with _lock:
        since = _waited_for.pop(server, None)
    if since is not None:
        _tell(f"{server} is back, after {time.monotonic() - since:.0f} s")


def _server(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _tell(text: str) -> None:
    if log.hasHandlers():  # else, in a worker process, it would go to stderr, too
        log.warning(text)
    with suppress(OSError, ValueError):  # a closed terminal
        print(f"onecurve: {text}", file=sys.stderr, flush=True)
