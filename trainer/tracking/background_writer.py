"""A tracker behind a queue, in a thread of its own: whatever it waits for, the run does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from trainer.tracking.base import Row, RunInfo, Tracker


class BlockingTracker(Tracker, Protocol):
    """A tracker that may wait for somebody else."""

    def load(self) -> None:
        """Imports what it needs. In the caller's thread: of two that import, one can find a module half made."""

    @property
    def patience_s(self) -> float:
        """How long the end of the run is to wait for it, from now on."""

    @property
    def advice(self) -> str:
        """What to do about what it did not take until then."""


class BackgroundWriter:
    """Hands everything on in order. An error of the tracker is raised by the next call, or at the end."""

    def __init__(self, tracker: BlockingTracker):
        self.tracker = tracker
        self.name = type(tracker).__name__
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)

    def start(self, info: RunInfo) -> None:
        self.tracker.load()
        self._put(lambda: self.tracker.start(info))
        self._thread.start()

    def rows(self, rows: list[Row]) -> None:
        self._put(lambda: self.tracker.rows(rows))

    def event(self, event: Row) -> None:
        self._put(lambda: self.tracker.event(event))

    def close(self, status: Row) -> None:
        """Waits until everything is handed on. Raises TimeoutError if the tracker's patience ends before."""
        if not self._thread.is_alive():
            return self._raise()
        self._queue.put(lambda: self.tracker.close(status))
        self._queue.put(None)
        patience = self.tracker.patience_s
        self._thread.join(patience)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"not done {patience:.0f} s after the end; {self.tracker.advice}")
        return None

    def _put(self, tell: Callable[[], None]) -> None:
        self._raise()
        self._queue.put(tell)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (tell := self._queue.get()) is not None:
            try:
                tell()
            except Exception as error:
                self._error = error
                return
