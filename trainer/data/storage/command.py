"""The output of a shell command in place of a shard."""

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
from trainer.secrets import without_secrets

PIECE = 256 << 10
LAST_LINES = 5
_running: set[subprocess.Popen[bytes]] = set()
_starting = threading.Lock()


def output(url: str, text: str) -> Generator[bytes, None, None]:
    """Yields what a command writes. `/bin/sh` runs it with empty input, as in webdataset. Raises DataError with exit
    code and last lines of stderr if it fails. Kills it and its children if the reader stops or the process ends.
    """
    with tempfile.TemporaryFile() as stderr:
        try:
            process = _start(text, stderr)
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
            size = stderr.seek(0, os.SEEK_END)
            stderr.seek(max(0, size - 4096))
            lines = stderr.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
            last_words = f": {without_secrets(' | '.join(line.strip() for line in lines))}" if lines else ""
            outcome = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise DataError(f"{shown(url)}: byte {at}: the command {outcome}{last_words}", shard=shown(url), byte=at)


def _start(text: str, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    with _starting:  # so that every command that runs is in `_running`
        process = subprocess.Popen(
            text, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
        )
        _running.add(process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the command's session, unless it has ended, and reaps it."""
    _running.discard(process)
    if process.stdout is not None:
        process.stdout.close()
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reset_after_fork() -> None:
    global _starting
    _starting = threading.Lock()
    _running.clear()  # the parent ends them


os.register_at_fork(after_in_child=_reset_after_fork)


@atexit.register
def end_all() -> None:
    """Kills all running commands before this process ends, and keeps it from starting others."""
    _starting.acquire()
    for process in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
