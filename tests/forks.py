"""Runs without the imports: the product's fork server, one for each process of the tests."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import tempfile
import time
from pathlib import Path

from launch.supervisor import Ranks

LONGEST_S = 300.0  # a run
PEERS_S = 10.0  # what the others get, once a rank has failed


def train(arguments: list[str], procs: int) -> tuple[list[int], str]:
    """Exit codes by rank, and what was written."""
    ranks, output = _server()
    written, codes = output.stat().st_size, dict[int, int]()
    deadline = time.monotonic() + LONGEST_S
    ranks.start(arguments, list(range(procs)), 0, os.environ)
    while len(codes) < procs:
        for rank, code in ranks.ended(timeout=0.1):
            codes[rank] = code
            if code not in (0, 75):
                deadline = min(deadline, time.monotonic() + PEERS_S)
        if time.monotonic() > deadline:
            ranks.signal(signal.SIGKILL)
    return [codes[rank] for rank in range(procs)], output.read_bytes()[written:].decode()


@functools.cache
def _server() -> tuple[Ranks, Path]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    descriptor, name = tempfile.mkstemp(prefix="onecurve-tests-")
    with os.fdopen(descriptor, "wb") as file:
        ranks = Ranks(4, file)
    atexit.register(ranks.close)
    atexit.register(Path(name).unlink)
    return ranks, Path(name)
