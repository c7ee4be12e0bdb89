"""A cache of chunks of remote objects: on disk, with a budget for all processes of a machine; else a few in memory.

A chunk is named by a hash of its object's whole URL and stamp, so a changed object, or another one of the same name,
never gets it. Files appear whole (renamed into place) under a lock, with a checksum, and may vanish at any time.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from filelock import Timeout

from trainer import locks

MEMORY_BYTES = 64 << 20  # budget in memory if the disk cannot be written
TOUCH_S = 30  # how often the use of a chunk is recorded on disk
LOCK_S = 20
_HEADER = struct.Struct("<8sQII")  # magic, bytes of content, their crc32, zero
_MAGIC = b"1curve\x00\x01"


def key(url: str, stamp: str, chunk_bytes: int) -> str:
    """Returns the key of an object's chunks."""
    return hashlib.sha256(f"{url}\0{stamp}\0{chunk_bytes}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Cache:
    """Keeps chunks by (key, number). `budget`: bytes on disk, including the files' headers; 0: none on disk."""

    def __init__(self, folder: str, budget: int):
        self._folder, self._budget = folder, budget
        self._lock = threading.Lock()
        self._storing = threading.Lock()
        self._memory: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._memory_bytes = 0
        self._checked: dict[str, tuple[int, int]] = {}  # file -> inode and size with a verified checksum
        self._touched: dict[str, float] = {}
        self.on_disk = budget > 0
        """Whether the last chunk could be written to disk."""

    def get(self, key: str, number: int, at: int, size: int) -> bytes | None:
        """Returns `size` bytes from byte `at` of a chunk; None if the cache does not have it."""
        with self._lock:
            if (chunk := self._memory.get((key, number))) is not None:
                self._memory.move_to_end((key, number))
                return chunk[at : at + size]
        if not self._budget:
            return None
        path = self._path(key, number)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not self._is_sound(path, file):
                with suppress(OSError):
                    os.unlink(path)
                return None
            content = os.pread(file, size, _HEADER.size + at)
        except OSError:
            return None
        finally:
            os.close(file)
        self._touch(path)
        return content if len(content) == size else None

    def has(self, key: str, number: int) -> bool:
        with self._lock:
            if (key, number) in self._memory:
                return True
        return self._budget > 0 and os.path.exists(self._path(key, number))

    def put(self, key: str, number: int, chunk: bytes) -> None:
        """Keeps a chunk: on disk, or in memory if it cannot be written to disk."""
        self.on_disk = self._budget > 0 and self._store(self._path(key, number), chunk)
        if self.on_disk:
            return
        with self._lock:
            self._memory_bytes += len(chunk) - len(self._memory.pop((key, number), b""))
            self._memory[key, number] = chunk
            while self._memory_bytes > MEMORY_BYTES and len(self._memory) > 2:
                self._memory_bytes -= len(self._memory.popitem(last=False)[1])

    def _path(self, key: str, number: int) -> str:
        return os.path.join(self._folder, key[:2], f"{key}-{number:08x}")

    def _is_sound(self, path: str, file: int) -> bool:
        """Returns whether the content is what was written; verifies it once a process and file."""
        status = os.fstat(file)
        identity = (status.st_ino, status.st_size)
        if self._checked.get(path) == identity:
            return True
        content = os.pread(file, status.st_size, 0)
        if len(content) < _HEADER.size:
            return False
        magic, size, checksum, _ = _HEADER.unpack_from(content)
        payload = memoryview(content)[_HEADER.size :]
        if (magic, size, checksum) != (_MAGIC, len(payload), zlib.crc32(payload)):
            return False
        self._mark_checked(path, identity)
        return True

    def _mark_checked(self, path: str, identity: tuple[int, int]) -> None:
        if len(self._checked) > 1 << 17:
            self._checked.clear()
            self._touched.clear()
        self._checked[path] = identity

    def _touch(self, path: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(path, -TOUCH_S) >= TOUCH_S:
            self._touched[path] = now
            with suppress(OSError):
                os.utime(path)

    def _store(self, path: str, chunk: bytes) -> bool:
        """Makes room for the file and writes it; returns whether that succeeded."""
        size = _HEADER.size + len(chunk)
        if size > self._budget:
            return False
        if os.path.exists(path):
            return True
        temporary = os.path.join(self._folder, f"{os.path.basename(path)}.tmp")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with (
                self._storing,
                locks.hold(Path(self._folder, ".lock"), LOCK_S, poll_s=0.01),
            ):
                used = self._read_used()
                if used is None or used + size > self._budget:
                    used = self._make_room(size)
                # Recorded first: after a kill in between the sum is too high, and is counted again when it matters.
                self._write_used(used + size)
                try:
                    with open(temporary, "wb") as file:
                        file.write(_HEADER.pack(_MAGIC, len(chunk), zlib.crc32(chunk), 0))
                        file.write(chunk)
                        status = os.fstat(file.fileno())
                    os.replace(temporary, path)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary)
                    raise
        except (OSError, Timeout):
            return False
        self._mark_checked(path, (status.st_ino, size))
        self._touched[path] = time.monotonic()
        return True

    def _read_used(self) -> int | None:
        try:
            with open(os.path.join(self._folder, ".used"), "rb") as file:
                return int(file.read())
        except (OSError, ValueError):
            return None

    def _write_used(self, used: int) -> None:
        with open(os.path.join(self._folder, ".used"), "wb") as file:
            file.write(str(used).encode())

    def _make_room(self, size: int) -> int:
        """Removes the least recently used files, so that `size` more bytes fit with some to spare; returns bytes in
        use."""
        files: list[tuple[int, int, str]] = []
        for folder in [entry for entry in os.scandir(self._folder) if entry.is_dir()]:
            for entry in os.scandir(folder.path):
                with suppress(OSError):
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        for entry in os.scandir(self._folder):  # from killed writers: they wrote under the lock that we hold
            if entry.name.endswith(".tmp"):
                os.unlink(entry.path)
        used = sum(size for _, size, _ in files)
        if used + size <= self._budget:
            return used
        for _, freed, path in sorted(files):
            if used + size <= self._budget - self._budget // 16:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= freed
        return used


@functools.cache
def shared(folder: str, budget: int) -> Cache:
    """Returns the process's cache of a folder."""
    return Cache(folder, budget)


os.register_at_fork(after_in_child=shared.cache_clear)
