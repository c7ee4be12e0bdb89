"""Durable files: complete or absent, even after a power cut; and their checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TypeVar

from trainer.outage import Patience, retry_during_outage

T = TypeVar("T")
CANNOT_SYNC = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP))


def read_file(path: Path | str) -> bytes:
    """Returns the content of a file, waiting for its storage as `with_file` does."""
    return with_file(path, lambda file: file.read())


def with_file(path: Path | str, use: Callable[[BinaryIO], T]) -> T:
    """Returns the result of `use` on an open file. Storage that does not answer is waited for, and the file opened
    again. Raises Outage; OSError for what the file system says of the file."""

    def attempt() -> T:
        with open(path, "rb") as file:
            return use(file)

    return retry_during_outage(attempt, Patience(str(path), str(path)))


def stat_file(path: Path | str) -> os.stat_result:
    """Returns the status of a file, waiting for its storage as `with_file` does."""
    return retry_during_outage(lambda: os.stat(path), Patience(str(path), str(path)))


def replace_file(path: Path, content: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Puts a file of this content, whole or in parts, at `path`: all of it or nothing, even if several processes do so
    at once."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            for part in [content] if isinstance(content, (bytes, bytearray, memoryview)) else content:
                file.write(part)
            file.flush()
            sync(file.fileno())
        move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_file(path: Path, content: bytes) -> bool:
    """Puts a file of this content at `path`, unless there is one; returns whether there was none. Readers see all of
    it; on a file system without hard links they may see a part for a moment."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def move(source: Path, target: Path) -> None:
    """Renames a file or folder. A rename that took place does not fail: where the answer of an NFS server gets lost,
    its client asks again and hears that there is nothing to rename."""
    before = os.lstat(source)
    try:
        os.rename(source, target)
    except OSError:
        if not _is_at(target, before):
            raise


def move_folder(source: Path, target: Path) -> None:
    """Renames a file or folder as `move` does, durably."""
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
    """Makes a file or a folder durable, as far as its file system can: some cannot sync folders (`onecurve doctor`
    reports that), and nothing can be done about it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def free_bytes(folder: Path) -> int | None:
    """Returns how many bytes may be written there; None where the file system does not say, as some in user space."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def sha256(path: Path) -> str:
    """Returns the hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
