"""Shards in local files: read by `pread`, or mapped into memory."""

from __future__ import annotations

import mmap
import os
from typing import Any

from trainer.data.storage.urls import shown
from trainer.errors import DataError


class _File:
    """An open file, closed when its last reader lets go of it: no thread reads from a recycled number."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalBlob:
    """A `Blob` of a file. `mapped` reads are memoryviews without a copy; a file cut short while mapped kills us.

    `url` and `stamp`: what it is known by, if not by its path and its own size and time. Raises DataError if it
    cannot be opened.
    """

    def __init__(self, path: str, url: str | None = None, *, mmap: bool = False, stamp: str | None = None):
        self.url = path if url is None else url
        self._path, self._mapped = path, mmap
        self._file: _File | None = None
        self._view: memoryview | None = None
        self._own = ""
        self._open()
        self.stamp = stamp or self._own

    def _open(self) -> None:
        try:
            file = _File(self._path)
            now = os.fstat(file.number)
            view = None
            if self._mapped and now.st_size:
                view = memoryview(mmap.mmap(file.number, 0, prot=mmap.PROT_READ))
        except (OSError, ValueError) as error:
            raise unreadable(self.url, error) from None
        if self._own not in ("", _stamp(now)):
            raise DataError(f"{shown(self.url)}: was changed after it had been opened", shard=shown(self.url))
        self.size, self._own = now.st_size, _stamp(now)
        self._file, self._view = file, view

    def read(self, at: int, size: int) -> bytes | memoryview:
        if (view := self._view) is not None:
            piece = view[at : at + size]
            return piece if len(piece) == size else self._short(at + len(piece), size - len(piece))
        if (file := self._file) is None:
            self._open()
            return self.read(at, size)
        try:
            content = os.pread(file.number, size, at)
            while len(content) < size and (more := os.pread(file.number, size - len(content), at + len(content))):
                content += more
        except OSError as error:
            raise unreadable(self.url, error, at) from None
        return content if len(content) == size else self._short(at + len(content), size - len(content))

    def _short(self, end: int, missing: int) -> bytes:
        name = shown(self.url)
        raise DataError(
            f"{name}: byte {end}: the file ends here, {missing} bytes are missing", shard=name, byte=end
        )  # fmt: skip

    def peek(self, at: int, size: int) -> bytes | memoryview:
        return self.read(at, size)

    def prefetch(self, at: int, size: int) -> None:
        """Nothing: the system reads ahead itself."""

    def close(self) -> None:
        self._file = self._view = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: the number means another one in another process."""
        return {**vars(self), "_file": None, "_view": None}


def stamp(path: str, url: str) -> str:
    """The stamp of a file as of now."""
    try:
        return _stamp(os.stat(path))
    except (OSError, ValueError) as error:
        raise unreadable(url, error) from None


def _stamp(now: os.stat_result) -> str:
    return f"{now.st_size}-{now.st_mtime_ns}"


def unreadable(url: str, error: Exception, byte: int | None = None) -> DataError:
    """What is told of an error of the operating system."""
    name, cause = shown(url), getattr(error, "strerror", None) or error
    place = name if byte is None else f"{name}: byte {byte}"
    return DataError(f"{place}: cannot be read: {cause}", shard=name, byte=byte)
