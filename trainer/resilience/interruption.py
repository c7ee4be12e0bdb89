"""Requests from outside: signals, `touch RUN_DIR/STOP`, `touch RUN_DIR/SAVE`.

A signal handler only sets a flag. The loop turns the flags of all ranks into one agreed decision at a step boundary, or
within an evaluation. If nothing would be lost, a thread ends the process instead.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STOP, SAVE = "STOP", "SAVE"
SECOND_INTERRUPT = "interrupted a second time: what came after the last checkpoint is not saved"
NOTHING_TO_SAVE = "stopped as asked{by}, before there was anything new to save: run the same command to continue"
PATIENCE_S = 5.0  # how long a signal waits for the loop if nothing would be lost
_LOOK_S = 0.25
_received: set[int] = set()  # signals that have arrived
_idle_since: float | None = None  # `time.monotonic()` since when there is nothing to save
_exit_callback: Callable[[str, int], None] | None = None
_read_end = _write_end = -1  # the pipe of the newest `listen`; runs of a sweep share a process
_previous_wakeup_fd = -1  # the wakeup fd before the first `listen`


def listen() -> None:
    """Turns signals into requests. A second Ctrl-C ends the process at once, whatever it is doing: checkpoints survive
    that at any instant. If nothing would be lost, the first signal does so, too, after a moment: the loop does not
    check for requests while a start reads, verifies or connects for minutes."""
    global _previous_wakeup_fd, _exit_callback, _read_end, _write_end
    _received.clear()
    _exit_callback = None
    allow_immediate_exit(True)
    is_first = _write_end == -1
    read, write = os.pipe()
    _read_end, _write_end = read, write
    os.set_blocking(write, False)
    previous_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _previous_wakeup_fd = previous_fd if is_first else _previous_wakeup_fd
    # A thread, because the main one may be in foreign code, where Python handles no signals.
    threading.Thread(target=_watch, args=(read,), name="interrupts", daemon=True).start()
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _record)


def handlers() -> dict[signal.Signals, Any]:
    """Returns the current handlers of the signals."""
    return {number: signal.getsignal(number) for number in SIGNALS}


def stop_listening(previous_handlers: Mapping[signal.Signals, Any]) -> None:
    """Restores the handlers from before `listen`, and ends its thread."""
    global _read_end, _write_end
    for number, handler in previous_handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if _write_end != -1:
        signal.set_wakeup_fd(_previous_wakeup_fd)
        write, _read_end, _write_end = _write_end, -1, -1
        os.close(write)  # this wakes the thread at the other end


def allow_immediate_exit(allowed: bool) -> None:
    """Sets whether a signal may end the process, because nothing was done since the checkpoint to continue from."""
    global _idle_since
    _idle_since = time.monotonic() if allowed else None


def set_exit_callback(callback: Callable[[str, int], None]) -> None:
    """Sets the function that is called with a reason and an exit code before a signal ends the process."""
    global _exit_callback
    _exit_callback = callback


def is_stop_requested() -> bool:
    """Returns whether a signal has asked this process to end."""
    return bool(_received)


def _record(number: int, _frame: FrameType | None) -> None:
    _received.add(number)


def _watch(pipe: int) -> None:
    received, first_signal_at = b"", math.inf
    while received.count(signal.SIGINT) < 2:
        ready = select.select([pipe], [], [], _LOOK_S if received else None)[0]
        if pipe != _read_end:
            os.close(pipe)
            return
        if ready:
            received += bytes(number for number in os.read(pipe, 64) if number in SIGNALS)
            first_signal_at = min(first_signal_at, time.monotonic() if received else math.inf)
        elif _idle_since is not None and time.monotonic() > max(first_signal_at, _idle_since) + PATIENCE_S:
            by = " by SIGUSR1" if signal.SIGUSR1 in received else ""
            _exit(NOTHING_TO_SAVE.format(by=by), Interrupted.exit_code, prints=os.environ.get("RANK", "0") == "0")
    _exit(SECOND_INTERRUPT, 4)


def _exit(reason: str, code: int, prints: bool = True) -> None:
    if prints:
        os.write(2, f"\nonecurve: {reason}\n".encode())
    with suppress(Exception):
        if _exit_callback is not None:
            _exit_callback(reason, code)
    os._exit(code)


class Requests:
    """The requests that this rank has received."""

    def __init__(self, folder: Path, watch_files: bool):
        self.folder, self.watch_files = folder, watch_files
        self.has_given_up = False  # waiting for something while the other ranks waited for this one
        self._checked_at = time.monotonic()  # when a rank that does not watch files last looked for one

    def is_stop_requested(self) -> bool:
        return self.has_given_up or bool(_received) or (self.watch_files and (self.folder / STOP).exists())

    def should_give_up(self, is_time_over: bool) -> bool:
        """Returns whether to stop instead of waiting any longer. Any rank looks for the file, because all wait for this
        one, but seldom, because many may be late at once. `is_time_over`: the run has reached its time limit."""
        has_file = False
        if self.watch_files or time.monotonic() > self._checked_at + PATIENCE_S:
            has_file, self._checked_at = (self.folder / STOP).exists(), time.monotonic()
        self.has_given_up = is_time_over or bool(_received) or has_file
        return self.has_given_up

    def is_requeue_requested(self) -> bool:
        """Returns whether a batch system has sent the signal after which the run is expected to queue again."""
        return signal.SIGUSR1 in _received

    def is_save_requested(self) -> bool:
        return self.watch_files and (self.folder / SAVE).exists()

    def remove(self, name: str) -> None:
        """Removes a request file after the request was honored."""
        if self.watch_files:
            with suppress(OSError):  # a folder that cannot be written for now
                (self.folder / name).unlink(missing_ok=True)
