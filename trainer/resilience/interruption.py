"""Requests from outside: signals, `touch RUN_DIR/STOP`, `touch RUN_DIR/SAVE`.

A signal handler only sets a flag. The loop turns the flags of all ranks into one agreed decision at a step boundary.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

STOP, SAVE = "STOP", "SAVE"


class Requests:
    """What this process was asked for."""

    def __init__(self, folder: Path, watch_files: bool):
        self.folder, self.watch_files = folder, watch_files
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:  # a second Ctrl-C leaves at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(self) -> bool:
        return self.signal is not None or (self.watch_files and (self.folder / STOP).exists())

    def save(self) -> bool:
        return self.watch_files and (self.folder / SAVE).exists()

    def done(self, name: str) -> None:
        """Takes a request file away, once it was honoured."""
        if self.watch_files:
            (self.folder / name).unlink(missing_ok=True)
