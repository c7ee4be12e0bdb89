"""Durable files: whole or not there at all, also after a power cut; and the checksum of what they hold."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TypeVar

from trainer.outage import Patience, patiently

T = TypeVar("T")
CANNOT_SYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP))


def read_file(path: Path | str) -> bytes:
    """Returns all that a file holds; as `with_file`."""
    return with_file(path, lambda file: file.read())


def with_file(path: Path | str, use: Callable[[BinaryIO], T]) -> T:
    """Returns what `use` makes of an open file. Storage that does not answer is waited for, and the file opened anew.
    Raises Outage; OSError for what the file system says of the file."""

    def attempt() -> T:
        with open(path, "rb") as file:
            return use(file)

    return patiently(attempt, Patience(str(path), str(path)))


def stat_file(path: Path | str) -> os.stat_result:
    """Returns the status of a file, waiting for its storage as `with_file` does."""
    return patiently(lambda: os.stat(path), Patience(str(path), str(path)))


def replace_file(path: Path, content: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Puts a file of this content, whole or in parts, at `path`: all of it or nothing, even if several processes do so
    at once."""
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            for part in [content] if isinstance(content, (bytes, bytearray, memoryview)) else content:
                file.write(part)
            file.flush()
            sync(file.fileno())
        move(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_file(path: Path, content: bytes) -> bool:
    """Puts a file of this content at `path`, unless there is one; returns whether there was none. Readers see all of
    it, or on a file system without hard links maybe a part for a moment."""
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        beside.write_bytes(content)
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        beside.unlink(missing_ok=True)
    return True


def move(source: Path, target: Path) -> None:
    """Renames a file or folder. A rename that took place does not fail: the answer of an NFS server may get lost, and
    its client, asking again, is told that there is nothing to rename."""
    before = os.lstat(source)
    try:
        os.rename(source, target)
    except OSError:
        if not _is_at(target, before):
            raise


def move_folder(source: Path, target: Path) -> None:
    """`move`, durably."""
    move(source, target)
    sync_folder(target.parent)


def _is_at(path: Path, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), before)
    except OSError:
        return False


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Makes a file or a folder durable, as far as its file system can: some sync no folders (`onecurve doctor` says
    so), and there is nothing to be done about that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def free_bytes(folder: Path) -> int | None:
    """Bytes that may be written there; None where the file system does not tell, as some in user space."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
