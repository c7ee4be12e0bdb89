"""Reads the files of a checkpoint. Storage that does not answer is waited for: that is not damage."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trainer import outage

T = TypeVar("T")
LARGEST_JSON = 1 << 30
ADVICE = (
    "see to its storage and run the same command again; should the file be lost for good, delete the checkpoint's "
    "folder: the one before it is taken then"
)


class DamagedCheckpoint(Exception):
    """Raised for a checkpoint that does not count; the text says why."""


def wait_for_answer(path: Path, make: Callable[[], T], patience_s: float | None = None) -> T:
    """Returns what `make` reads of `path`, once its storage answers. Raises Outage; an OSError that is an answer."""
    return outage.retry_during_outage(make, outage.Patience(str(path), str(path), patience_s, advice=ADVICE))


class Reader(io.RawIOBase):
    """A file of a checkpoint, open for reading from any byte on. After an outage it is reopened, since a stale handle
    stays stale, and reading continues where it stopped."""

    def __init__(self, path: Path, patience_s: float | None = None):
        """Opens the file. Raises what `wait_for_answer` does; DamagedCheckpoint for a link or a pipe."""
        self._path, self._patience_s, self._position = path, patience_s, 0
        self._file: io.FileIO | None = None
        self.size: int = self._use(lambda file: os.fstat(file.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._use(lambda file: _read_into(file, buffer))
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = self._use(lambda file: file.seek(offset))
        return self._position

    def close(self) -> None:
        self._drop()
        super().close()

    def _use(self, call: Callable[[io.FileIO], T]) -> T:
        return wait_for_answer(self._path, lambda: self._attempt(call), self._patience_s)

    def _attempt(self, call: Callable[[io.FileIO], T]) -> T:
        try:
            if self._file is None:
                self._file = _open_regular(self._path)
                self._file.seek(self._position)
            return call(self._file)
        except OSError:
            self._drop()
            raise

    def _drop(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            self._file = None
            file.close()


def _read_into(file: io.FileIO, buffer: Any) -> int:
    if (count := file.readinto(buffer)) is None:  # how Python reports EAGAIN; it is not the end of the file
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return count


def _open_regular(path: Path) -> io.FileIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedCheckpoint(f"{path.name} is not a file") from None
        raise
    file = io.FileIO(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise DamagedCheckpoint(f"{path.name} is not a file")
    return file


def open_file(path: Path, patience_s: float | None = None) -> Reader:
    """Opens a file of a checkpoint for reading. Raises Outage; OSError; DamagedCheckpoint for a link or a pipe, since
    all of a checkpoint lies in its own folder."""
    return Reader(path, patience_s)


def read_small(path: Path, patience_s: float | None = None) -> bytes:
    """Returns the contents of a JSON file. Raises DamagedCheckpoint if it is absurdly large; Outage; OSError."""
    with open_file(path, patience_s) as file:
        if file.size > LARGEST_JSON:
            raise DamagedCheckpoint(f"{path.name} is absurdly large")
        return b"".join(iter(lambda: file.read(1 << 23), b""))


def read_exactly(file: Reader, count: int) -> bytes:
    data = bytearray(count)
    fill_buffer(file, data)
    return bytes(data)


def fill_buffer(file: Reader, data: bytearray) -> None:
    """Fills `data` with the next bytes of the file. Raises EOFError; Outage; OSError."""
    position = 0
    while position < len(data):
        if not (count := file.readinto(memoryview(data)[position:])):
            raise EOFError("it ends too early")
        position += count
