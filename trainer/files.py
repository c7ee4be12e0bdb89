"""Durable files: whole or not there at all, also after a power cut; and the checksum of what they hold."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, content: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Puts a file of this content, whole or in parts, at `path`: all of it or nothing, even if several processes do so
    at once."""
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            for part in [content] if isinstance(content, (bytes, bytearray, memoryview)) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
