"""The output of a shell command that stands where a shard could."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import IO

from trainer.data.storage.urls import shown
from trainer.errors import DataError
from trainer.secrets import said

PIECE = 256 << 10
LAST_LINES = 5
_running: set[subprocess.Popen[bytes]] = set()
_starting = threading.Lock()


def output(url: str, text: str) -> Generator[bytes, None, None]:
    """What the command writes, run by `/bin/sh` with nothing to read, as webdataset runs it. DataError with its exit
    code and its last words if that is not 0. It and what it started are killed if the reader stops or the process ends.
    """
    with tempfile.TemporaryFile() as words:
        try:
            process = _start(text, words)
        except (OSError, ValueError) as error:
            raise DataError(f"{shown(url)}: cannot be run: {error}", shard=shown(url)) from None
        at = 0
        try:
            assert process.stdout is not None
            while piece := process.stdout.read(PIECE):
                at += len(piece)
                yield piece
            code = process.wait()
        finally:
            _end(process)
        if code:
            size = words.seek(0, os.SEEK_END)
            words.seek(max(0, size - 4096))
            lines = words.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
            told = f": {said(' | '.join(line.strip() for line in lines))}" if lines else ""
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise DataError(f"{shown(url)}: byte {at}: the command {how}{told}", shard=shown(url), byte=at)


def _start(text: str, words: IO[bytes]) -> subprocess.Popen[bytes]:
    with _starting:  # so that none has begun that is not known to be running
        process = subprocess.Popen(
            text, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, start_new_session=True
        )
        _running.add(process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the command's session, unless it has ended, and collects it."""
    _running.discard(process)
    if process.stdout is not None:
        process.stdout.close()
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _forked() -> None:
    global _starting
    _starting = threading.Lock()
    _running.clear()  # they are the parent's to end


os.register_at_fork(after_in_child=_forked)


@atexit.register
def end_all() -> None:
    """Kills all commands that run, before this process ends; it can start none any more."""
    _starting.acquire()
    for process in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
