"""Requests from outside: signals, `touch RUN_DIR/STOP`, `touch RUN_DIR/SAVE`.

A signal handler only sets a flag. The loop turns the flags of all ranks into one agreed decision at a step boundary.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

STOP, SAVE = "STOP", "SAVE"
TWICE = "interrupted a second time: what came after the last checkpoint is not saved"
_asked: set[int] = set()  # the signals that came
_last_words: Callable[[], None] | None = None


def listen() -> None:
    """From now on signals are requests. A second Ctrl-C ends the process at once, whatever it is doing: checkpoints
    bear that at any instant."""
    _asked.clear()
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # A thread: the main one may be in foreign code, where Python hears of no signal.
    threading.Thread(target=_watch, args=(read,), name="interrupts", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _note)


def before_leaving_at_once(last_words: Callable[[], None]) -> None:
    """What is done when a second Ctrl-C ends the process."""
    global _last_words
    _last_words = last_words


def is_asked() -> bool:
    """Returns whether a signal has asked this process to end."""
    return bool(_asked)


def _note(number: int, _frame: FrameType | None) -> None:
    _asked.add(number)


def _watch(pipe: int) -> None:
    interrupts = 0
    while interrupts < 2:
        interrupts += os.read(pipe, 64).count(signal.SIGINT)
    os.write(2, f"\nonecurve: {TWICE}\n".encode())
    with suppress(Exception):
        if _last_words is not None:
            _last_words()
    os._exit(4)


class Requests:
    """What this process was asked for."""

    def __init__(self, folder: Path, watch_files: bool):
        self.folder, self.watch_files = folder, watch_files

    def stop(self) -> bool:
        return bool(_asked) or (self.watch_files and (self.folder / STOP).exists())

    def give_way(self) -> bool:
        """To stop for now: a batch system's signal, after which it is expected to queue again."""
        return signal.SIGUSR1 in _asked

    def save(self) -> bool:
        return self.watch_files and (self.folder / SAVE).exists()

    def done(self, name: str) -> None:
        """Takes a request file away, once it was honoured."""
        if self.watch_files:
            with suppress(OSError):  # a folder that cannot be written for now
                (self.folder / name).unlink(missing_ok=True)
