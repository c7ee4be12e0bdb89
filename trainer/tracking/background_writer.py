"""Runs a tracker behind a queue in its own thread: the run does not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from trainer.tracking.base import Row, RunInfo, Tracker


class BlockingTracker(Tracker, Protocol):
    """A tracker whose calls may block."""

    def load(self) -> None:
        """Imports its packages, in the caller's thread: imports in two threads can meet half-loaded modules."""

    @property
    def patience_s(self) -> float:
        """Returns how many seconds the end of the run waits for it from now on."""

    @property
    def advice(self) -> str:
        """Returns what the user can do about data that it did not accept in time."""


class BackgroundWriter:
    """Passes everything on in order. The next call, or the end, raises an error of the tracker."""

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
        """Waits until everything is passed on. Raises TimeoutError after the tracker's `patience_s`."""
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

    def _put(self, call: Callable[[], None]) -> None:
        self._raise()
        self._queue.put(call)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception as error:
                self._error = error
                return
