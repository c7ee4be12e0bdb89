"""Shards that can only be read from front to back - compressed tars, outputs of commands, servers without ranges - are
read once, into a file in the cache folder that all processes of the machine share."""

from __future__ import annotations

import bz2
import hashlib
import json
import lzma
import os
import re
import time
import zlib
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainer import locks
from trainer.data.storage import command
from trainer.data.storage.local import LocalBlob
from trainer.data.storage.urls import PIPE, absolute, is_remote, shown
from trainer.errors import ConfigError, DataError
from trainer.files import move, read_file, replace_file, stat_file, sync

if TYPE_CHECKING:
    from trainer.data.storage.remote import RemoteBlob
    from trainer.data.storage.settings import Blob, Settings

PIECE = 256 << 10
UNUSED_S = 24 * 3600  # former versions of a file that were not opened for so long are removed
_SUFFIX = re.compile(r"\.(?:tar\.(gz|xz|bz2|zst)|(tgz|txz|tbz2|tzst))$", re.IGNORECASE)
_SHORT = {"tgz": "gz", "txz": "xz", "tbz2": "bz2", "tzst": "zst"}


def compression(url: str) -> str | None:
    """Returns `gz`, `xz`, `bz2` or `zst` by the end of the name; None for a plain tar."""
    match = _SUFFIX.search(urlsplit(url).path if is_remote(url) else url)
    if not match:
        return None
    return (match[1] or _SHORT[match[2].lower()]).lower()


def unpacked(storage: Settings, url: str, open_packed: Callable[[], Blob]) -> Blob:
    """Opens the tar within a compressed file. Its stamp is the compressed file's."""
    make_decompressor = _decompressor(url)
    packed_blob = open_packed()
    try:
        # Another name than that of the packed copy, which there is if its server sends no parts.
        version = f"unpacked {packed_blob.stamp}"
        return _open_kept(
            storage,
            url,
            version,
            packed_blob.stamp,
            lambda: _decompress(packed_blob, make_decompressor, storage.chunk_bytes),
        )
    finally:
        packed_blob.close()


def copied(storage: Settings, blob: RemoteBlob) -> Blob:
    """Opens a copy of a whole object whose server sends no parts."""
    return _open_kept(storage, blob.url, blob.stamp, blob.stamp, blob.whole)


def piped(storage: Settings, url: str) -> Blob:
    """Opens the output of a shell command. Its stamp is a checksum, so that a changed output is noticed."""
    return _open_kept(storage, url, storage.pipes, None, lambda: command.output(url, url[len(PIPE) :]))


def forget(storage: Settings, url: str) -> None:
    """Deletes the kept output of a command under `storage.pipes`."""
    path = _path(storage, url, storage.pipes)
    for kind in (".json", ".tar", ".lock"):
        with suppress(OSError):
            path.with_suffix(kind).unlink()


def _open_kept(
    storage: Settings,
    url: str,
    version: str,
    stamp: str | None,
    make_pieces: Callable[[], Generator[bytes, None, None]],
) -> Blob:
    """Opens the file of the pieces that `make_pieces` yields; one process writes it if it is missing. `stamp`: the
    blob's; None: made of its content."""
    path = _path(storage, url, version)
    with suppress(DataError):  # it may be removed at this moment
        if (facts := _facts(path)) is not None:  # whole: no need to wait for others, nor to write to the folder
            return _open(storage, path, url, stamp, facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold_when_free(path.with_suffix(".lock")):
            if (facts := _facts(path)) is None:
                facts = _write(path, url, make_pieces())
                _remove_former_versions(path)
            return _open(storage, path, url, stamp, facts)
    except OSError as error:
        problem = f"data.cache={storage.cache}: {shown(url)} cannot be unpacked there: {error.strerror or error}"
        raise ConfigError(problem) from None


def _path(storage: Settings, url: str, version: str) -> Path:
    return storage.cache / "unpacked" / f"{_hash(absolute(url))}-{_hash(version)}.tar"


def _open(storage: Settings, path: Path, url: str, stamp: str | None, facts: dict[str, Any]) -> Blob:
    with suppress(OSError):  # marks it as used; the time of the tar itself must not change
        os.utime(path.with_suffix(".json"))
    stamp = stamp or f"{facts['size']}-{facts['crc32']:08x}"
    return LocalBlob(str(path), url, mmap=storage.mmap, stamp=stamp, storage=storage)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _facts(path: Path) -> dict[str, Any] | None:
    """Reads what was recorded when the file was written; returns None if its size has changed."""
    try:
        facts = json.loads(read_file(path.with_suffix(".json")))
        return facts if facts["size"] == stat_file(path).st_size and isinstance(facts["crc32"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, url: str, pieces: Generator[bytes, None, None]) -> dict[str, Any]:
    temporary = path.with_name(f".{path.stem}.tmp")  # under the file's lock: one that exists is from a killed process
    size = checksum = 0
    try:
        with closing(pieces), open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
                size, checksum = size + len(piece), zlib.crc32(piece, checksum)
            file.flush()
            sync(file.fileno())  # after a power cut only the size is compared
        facts = {"url": shown(url), "size": size, "crc32": checksum}
        path.with_suffix(".json").unlink(missing_ok=True)  # it describes other content, maybe of the same size
        move(temporary, path)
        replace_file(path.with_suffix(".json"), json.dumps(facts).encode())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return facts


def _remove_former_versions(path: Path) -> None:
    """Removes other versions that are unused, and temporary files of killed processes."""
    folder, prefix = path.parent, path.name.partition("-")[0]
    for other_path in (*folder.glob(f"{prefix}-*.json"), *folder.glob(f".{prefix}-*.tmp")):
        with suppress(OSError):
            if other_path.stem != path.stem and time.time() - other_path.stat().st_mtime > UNUSED_S:
                other_path.unlink()
                other_path.with_suffix(".tar").unlink(missing_ok=True)


def _decompressor(url: str) -> Callable[[], Any]:
    """Returns a function that makes a decompressor of one stream, by the file's name."""
    kind = compression(url)
    if kind == "zst":
        try:
            from compression import zstd  # type: ignore[import-not-found]
        except ImportError:
            raise ConfigError(f"{shown(url)}: .zst needs Python 3.14; repack it, or pipe:zstd -dc FILE") from None
        return zstd.ZstdDecompressor
    kinds: dict[str | None, Callable[[], Any]] = {
        "gz": lambda: zlib.decompressobj(31),
        "xz": lzma.LZMADecompressor,
        "bz2": bz2.BZ2Decompressor,
    }
    return kinds[kind]


def _decompress(blob: Blob, make_decompressor: Callable[[], Any], chunk: int) -> Generator[bytes, None, None]:
    """Yields the unpacked bytes of all streams of the file. Raises DataError with url and byte of the packed file."""
    at, stream, pending = 0, make_decompressor(), b""
    is_at_start = True  # at the start of a stream: the file may end here
    while pending or at < blob.size:
        if not pending:
            size = min(PIECE, blob.size - at)
            blob.prefetch(at + size, 4 * chunk)
            pending = bytes(blob.read(at, size))
            at += size
        if is_at_start and at > len(pending) and not (pending := pending.lstrip(b"\0")):
            continue  # zeros that fill up a tape's block
        stream_copy = stream.copy() if hasattr(stream, "copy") else None
        try:
            piece = stream.decompress(pending)
        except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
            byte = at - len(pending) + _count_sound_bytes(stream_copy, pending)
            raise _damage_error(blob.url, byte, f"damaged compressed data: {error}") from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise _damage_error(blob.url, at - len(pending), f"damaged compressed data: {error}") from None
        is_at_start, pending = stream.eof, stream.unused_data if stream.eof else b""
        if is_at_start:
            stream = make_decompressor()
        if piece:
            yield piece
    if not is_at_start or not blob.size:
        raise _damage_error(blob.url, blob.size, "the compressed file ends here, in the middle of its data")


def _count_sound_bytes(stream: Any, piece: bytes) -> int:
    """Returns how many bytes of a piece are sound; 0 if the stream could not be copied."""
    if stream is None:
        return 0
    for n in range(len(piece)):
        try:
            stream.decompress(piece[n : n + 1])
        except zlib.error:
            return n
    return 0


def _damage_error(url: str, byte: int, problem: str) -> DataError:
    return DataError(f"{shown(url)}: byte {byte}: {problem}", shard=shown(url), byte=byte)
