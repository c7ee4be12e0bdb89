"""Shards in local files: read by `pread`, or mapped into memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.data.storage.urls import shown
from trainer.errors import DataError
from trainer.outage import CANNOT_MAP, LIMITS, Patience, is_outage, retry_during_outage

if TYPE_CHECKING:
    from trainer.data.storage.settings import Settings

T = TypeVar("T")


class _File:
    """Holds an open file until its last reader releases it, so that no thread reads from a recycled descriptor."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalBlob:
    """Reads a file as a `Blob`. With `mmap` reads are memoryviews without a copy; a file that is cut short while mapped
    kills the process, and so does failing storage: the kernel has no other way to report it.

    `url` and `stamp`: in place of the file's path and of its size and time. `storage`: says how long to wait for it;
    None: not at all. Raises DataError if it cannot be opened.
    """

    def __init__(
        self,
        path: str,
        url: str | None = None,
        *,
        mmap: bool = False,
        stamp: str | None = None,
        storage: Settings | None = None,
    ):
        self.url = path if url is None else url
        self._path, self._is_mapped, self._storage = path, mmap, storage
        self._file: _File | None = None
        self._view: memoryview | None = None
        self._file_stamp = ""
        _read_patiently(self._open, storage, self.url)
        self.stamp = stamp or self._file_stamp

    def _open(self) -> _File:
        file = _File(self._path)
        status = os.fstat(file.number)
        view = _map_file(file) if self._is_mapped and status.st_size else None
        if self._file_stamp not in ("", _stamp(status)):
            raise DataError(f"{shown(self.url)}: was changed after it had been opened", shard=shown(self.url))
        self.size, self._file_stamp = status.st_size, _stamp(status)
        self._file, self._view = file, view
        return file

    def read(self, at: int, size: int) -> bytes | memoryview:
        if (view := self._view) is not None:
            piece: bytes | memoryview = view[at : at + size]
        else:
            try:
                piece = self._pread(at, size)
            except (OSError, ValueError):
                piece = _read_patiently(lambda: self._pread(at, size), self._storage, self.url, at)
        return piece if len(piece) == size else self._short(at + len(piece), size - len(piece))

    def _pread(self, at: int, size: int) -> bytes | memoryview:
        file = self._file or self._open()
        if (view := self._view) is not None:  # another thread closed the file
            return view[at : at + size]
        try:
            content = os.pread(file.number, size, at)
            while len(content) < size and (more := os.pread(file.number, size - len(content), at + len(content))):
                content += more
        except OSError as error:
            if is_outage(error):
                self.close()  # a stale handle stays stale: the next attempt opens the file anew
            raise
        return content

    def _short(self, end: int, missing: int) -> bytes:
        name = shown(self.url)
        raise DataError(
            f"{name}: byte {end}: the file ends here, {missing} bytes are missing", shard=name, byte=end
        )  # fmt: skip

    def peek(self, at: int, size: int) -> bytes | memoryview:
        return self.read(at, size)

    def prefetch(self, at: int, size: int) -> None:
        """Does nothing: the system reads ahead itself."""

    def close(self) -> None:
        self._file = self._view = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the open file: its number means another file in another process."""
        return {**vars(self), "_file": None, "_view": None}


def stamp(path: str, url: str, storage: Settings | None = None) -> str:
    """Returns the present stamp of a file."""
    return _stamp(_read_patiently(lambda: os.stat(path), storage, url))


def _map_file(file: _File) -> memoryview | None:
    """Maps the file into memory; returns None if its file system cannot, as some in user space: then it is read."""
    try:
        return memoryview(mmap.mmap(file.number, 0, prot=mmap.PROT_READ))
    except OSError as error:
        if error.errno not in CANNOT_MAP:
            raise
        return None


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _read_patiently(make: Callable[[], T], storage: Settings | None, url: str, byte: int | None = None) -> T:
    """Returns what `make` gives, once the storage answers. Raises DataError for what is wrong with the file, Outage
    where its storage does not answer, OSError where this process may have no more files or memory."""
    try:
        patience = Patience(shown(url), shown(url), 0) if storage is None else storage.patience(url)
        return retry_during_outage(make, patience, byte)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in LIMITS:
            raise
        name, cause = shown(url), getattr(error, "strerror", None) or error
        place = name if byte is None else f"{name}: byte {byte}"
        raise DataError(f"{place}: cannot be read: {cause}", shard=name, byte=byte) from None
