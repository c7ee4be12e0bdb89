"""Requests from outside: signals, `touch RUN_DIR/STOP`, `touch RUN_DIR/SAVE`.

A signal handler only sets a flag. The loop turns the flags of all ranks into one agreed decision at a step boundary, or
within an evaluation. Where nothing would be lost by it, a thread ends the process instead.
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
TWICE = "interrupted a second time: what came after the last checkpoint is not saved"
EARLY = "stopped as asked{by}, before there was anything new to save: run the same command to continue"
PATIENCE_S = 5.0  # how long a signal waits for the loop where nothing would be lost without it
_LOOK_S = 0.25
_asked: set[int] = set()  # the signals that came
_idle_since: float | None = None  # `time.monotonic()` since when there is nothing to save
_last_words: Callable[[str, int], None] | None = None
_listening = _woken = -1  # the pipe of the newest `listen`, both ends: a sweep's runs follow each other in one process
_before = -1  # what was woken before the first `listen`


def listen() -> None:
    """Turns signals into requests. A second Ctrl-C ends the process at once, whatever it is doing: checkpoints
    bear that at any instant. So does the first signal, after a moment, where nothing would be lost: a start that reads,
    verifies or connects for minutes asks nobody."""
    global _before, _last_words, _listening, _woken
    _asked.clear()
    _last_words = None
    may_leave_at_once(True)
    is_first = _woken == -1
    read, write = os.pipe()
    _listening, _woken = read, write
    os.set_blocking(write, False)
    was = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _before = was if is_first else _before
    # A thread: the main one may be in foreign code, where Python hears of no signal.
    threading.Thread(target=_watch, args=(read,), name="interrupts", daemon=True).start()
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _note)


def handlers() -> dict[signal.Signals, Any]:
    """Returns what the signals mean to this process now."""
    return {number: signal.getsignal(number) for number in SIGNALS}


def stop_listening(meant: Mapping[signal.Signals, Any]) -> None:
    """Gives the signals back what they `meant` before `listen`, and ends its thread."""
    global _listening, _woken
    for number, handler in meant.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if _woken != -1:
        signal.set_wakeup_fd(_before)
        write, _listening, _woken = _woken, -1, -1
        os.close(write)  # which the thread, waiting at the other end, hears


def may_leave_at_once(idle: bool) -> None:
    """Says whether nothing was done since the checkpoint that the run would go on from."""
    global _idle_since
    _idle_since = time.monotonic() if idle else None


def before_leaving_at_once(last_words: Callable[[str, int], None]) -> None:
    """Sets what is done, with a reason and an exit code, when a signal ends the process."""
    global _last_words
    _last_words = last_words


def is_stop_requested() -> bool:
    """Returns whether a signal has asked this process to end."""
    return bool(_asked)


def _note(number: int, _frame: FrameType | None) -> None:
    _asked.add(number)


def _watch(pipe: int) -> None:
    came, asked_at = b"", math.inf
    while came.count(signal.SIGINT) < 2:
        ready = select.select([pipe], [], [], _LOOK_S if came else None)[0]
        if pipe != _listening:
            os.close(pipe)
            return
        if ready:
            came += bytes(number for number in os.read(pipe, 64) if number in SIGNALS)
            asked_at = min(asked_at, time.monotonic() if came else math.inf)
        elif _idle_since is not None and time.monotonic() > max(asked_at, _idle_since) + PATIENCE_S:
            by = " by SIGUSR1" if signal.SIGUSR1 in came else ""
            _leave(EARLY.format(by=by), Interrupted.exit_code, tell=os.environ.get("RANK", "0") == "0")
    _leave(TWICE, 4)


def _leave(reason: str, code: int, tell: bool = True) -> None:
    if tell:
        os.write(2, f"\nonecurve: {reason}\n".encode())
    with suppress(Exception):
        if _last_words is not None:
            _last_words(reason, code)
    os._exit(code)


class Requests:
    """What this process was asked for."""

    def __init__(self, folder: Path, watch_files: bool):
        self.folder, self.watch_files = folder, watch_files
        self.has_given_up = False  # what it waited for, while the others waited for it
        self._looked = time.monotonic()  # when this rank, if it does not watch it, looked for the file

    def stop(self) -> bool:
        return self.has_given_up or bool(_asked) or (self.watch_files and (self.folder / STOP).exists())

    def should_give_up(self, over: bool) -> bool:
        """Whether to stop instead of waiting any longer. Looks for the file on any rank, because all wait for this one;
        seldom, because many may be late at once. `over`: its time is."""
        found = False
        if self.watch_files or time.monotonic() > self._looked + PATIENCE_S:
            found, self._looked = (self.folder / STOP).exists(), time.monotonic()
        self.has_given_up = over or bool(_asked) or found
        return self.has_given_up

    def give_way(self) -> bool:
        """To stop for now: a batch system's signal, after which it is expected to queue again."""
        return signal.SIGUSR1 in _asked

    def save(self) -> bool:
        return self.watch_files and (self.folder / SAVE).exists()

    def done(self, name: str) -> None:
        """Takes a request file away, once it was honored."""
        if self.watch_files:
            with suppress(OSError):  # a folder that cannot be written for now
                (self.folder / name).unlink(missing_ok=True)
