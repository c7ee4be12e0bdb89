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


class Job:
    """The ranks of one run, which this process's fork server started. It has one job at a time."""

    def __init__(self, arguments: list[str], procs: int):
        self.procs, self.codes = procs, dict[int, int]()
        self._ranks, self._output = _server()
        self._written = self._output.stat().st_size
        self._deadline = time.monotonic() + LONGEST_S
        self._ranks.start(arguments, list(range(procs)), 0, os.environ)

    def running(self, timeout: float = 0.0) -> bool:
        """Waits up to `timeout` seconds for a rank to end, and returns whether any is left. None is past the time that
        a run may take, or that the others get once one has failed."""
        if len(self.codes) < self.procs:
            for rank, code in self._ranks.poll(timeout):
                self.codes[rank] = code
                if code not in (0, 75):
                    self._deadline = min(self._deadline, time.monotonic() + PEERS_S)
            if time.monotonic() > self._deadline:
                self.signal(signal.SIGKILL)
        return len(self.codes) < self.procs

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all ranks."""
        self._ranks.signal(number)

    def end(self) -> tuple[list[int], str]:
        """Waits for all ranks; returns their exit codes, or minus a signal, and what was written."""
        while self.running(timeout=0.1):
            pass
        output = self._output.read_bytes()[self._written :].decode()
        return [self.codes[rank] for rank in range(self.procs)], output


def train(arguments: list[str], procs: int) -> tuple[list[int], str]:
    """Runs to the end; returns exit codes by rank, and what was written."""
    return Job(arguments, procs).end()


@functools.cache
def _server() -> tuple[Ranks, Path]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    descriptor, name = tempfile.mkstemp(prefix="onecurve-tests-")
    with os.fdopen(descriptor, "wb") as file:
        ranks = Ranks(4, file)
    atexit.register(ranks.close)
    atexit.register(Path(name).unlink)
    return ranks, Path(name)
