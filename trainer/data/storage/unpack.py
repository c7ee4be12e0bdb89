"""What can only be read from front to back - compressed tars, outputs of commands, servers without ranges - is read so
once, into a file of the cache folder that all processes of the machine share; then it is a local file."""

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
UNUSED_S = 24 * 3600  # a former version of a file that nothing opened for so long is removed
_SUFFIX = re.compile(r"\.(?:tar\.(gz|xz|bz2|zst)|(tgz|txz|tbz2|tzst))$", re.IGNORECASE)
_SHORT = {"tgz": "gz", "txz": "xz", "tbz2": "bz2", "tzst": "zst"}


def compression(url: str) -> str | None:
    """`gz`, `xz`, `bz2` or `zst` by the name's end; None for a plain tar."""
    match = _SUFFIX.search(urlsplit(url).path if is_remote(url) else url)
    if not match:
        return None
    return (match[1] or _SHORT[match[2].lower()]).lower()


def unpacked(storage: Settings, url: str, open_packed: Callable[[], Blob]) -> Blob:
    """The tar within a compressed file. Its stamp is the compressed file's."""
    new = _decompressor(url)
    packed = open_packed()
    try:
        # Not the name under which it is kept packed, if its server sends no parts.
        version = f"unpacked {packed.stamp}"
        return _kept(storage, url, version, packed.stamp, lambda: _decompress(packed, new, storage.chunk_bytes))
    finally:
        packed.close()


def copied(storage: Settings, blob: RemoteBlob) -> Blob:
    """The whole object of a server that sends no parts."""
    return _kept(storage, blob.url, blob.stamp, blob.stamp, blob.whole)


def piped(storage: Settings, url: str) -> Blob:
    """The output of a shell command. Its stamp is a checksum: a command that gives something else is noticed."""
    return _kept(storage, url, storage.pipes, None, lambda: command.output(url, url[len(PIPE) :]))


def forget(storage: Settings, url: str) -> None:
    """Deletes what is kept of a command under `storage.pipes`."""
    path = _path(storage, url, storage.pipes)
    for kind in (".json", ".tar", ".lock"):
        with suppress(OSError):
            path.with_suffix(kind).unlink()


def _kept(
    storage: Settings, url: str, version: str, stamp: str | None, pieces: Callable[[], Generator[bytes, None, None]]
) -> Blob:
    """The blob of the file that holds `pieces`; made if it is not there yet, by one process. `stamp`: the blob's; None:
    one of its content."""
    path = _path(storage, url, version)
    with suppress(DataError):  # removed at this moment
        if (facts := _facts(path)) is not None:  # whole: others need not be waited for, nor the folder be written
            return _open(storage, path, url, stamp, facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.waited_for(path.with_suffix(".lock")):
            if (facts := _facts(path)) is None:
                facts = _write(path, url, pieces())
                _remove_former(path)
            return _open(storage, path, url, stamp, facts)
    except OSError as error:
        problem = f"data.cache={storage.cache}: {shown(url)} cannot be unpacked there: {error.strerror or error}"
        raise ConfigError(problem) from None


def _path(storage: Settings, url: str, version: str) -> Path:
    return storage.cache / "unpacked" / f"{_hash(absolute(url))}-{_hash(version)}.tar"


def _open(storage: Settings, path: Path, url: str, stamp: str | None, facts: dict[str, Any]) -> Blob:
    with suppress(OSError):  # in use; the file's own time is part of what others know it by
        os.utime(path.with_suffix(".json"))
    stamp = stamp or f"{facts['size']}-{facts['crc32']:08x}"
    return LocalBlob(str(path), url, mmap=storage.mmap, stamp=stamp, storage=storage)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _facts(path: Path) -> dict[str, Any] | None:
    """What was noted of the file when it was written, if it still is of that size."""
    try:
        facts = json.loads(read_file(path.with_suffix(".json")))
        return facts if facts["size"] == stat_file(path).st_size and isinstance(facts["crc32"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, url: str, pieces: Generator[bytes, None, None]) -> dict[str, Any]:
    beside = path.with_name(f".{path.stem}.tmp")  # under the file's lock, so a former one is a killed process's
    size = checksum = 0
    try:
        with closing(pieces), open(beside, "wb") as file:
            for piece in pieces:
                file.write(piece)
                size, checksum = size + len(piece), zlib.crc32(piece, checksum)
            file.flush()
            sync(file.fileno())  # of what a power cut leaves, only the size is looked at
        facts = {"url": shown(url), "size": size, "crc32": checksum}
        path.with_suffix(".json").unlink(missing_ok=True)  # it is of another content, which may have the same size
        move(beside, path)
        replace_file(path.with_suffix(".json"), json.dumps(facts).encode())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return facts


def _remove_former(path: Path) -> None:
    """Removes other versions that nothing uses, and what killed processes left of them."""
    folder, family = path.parent, path.name.partition("-")[0]
    for other in (*folder.glob(f"{family}-*.json"), *folder.glob(f".{family}-*.tmp")):
        with suppress(OSError):
            if other.stem != path.stem and time.time() - other.stat().st_mtime > UNUSED_S:
                other.unlink()
                other.with_suffix(".tar").unlink(missing_ok=True)


def _decompressor(url: str) -> Callable[[], Any]:
    """Makes what unpacks one stream of the file's kind."""
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


def _decompress(blob: Blob, new: Callable[[], Any], chunk: int) -> Generator[bytes, None, None]:
    """The unpacked bytes of all streams of the file, one after the other. DataError: url, byte of the packed file."""
    at, stream, rest = 0, new(), b""
    fresh = True  # at the start of a stream: the file may end here
    while rest or at < blob.size:
        if not rest:
            size = min(PIECE, blob.size - at)
            blob.prefetch(at + size, 4 * chunk)
            rest = bytes(blob.read(at, size))
            at += size
        if fresh and at > len(rest) and not (rest := rest.lstrip(b"\0")):
            continue  # zeros that fill up a tape's block
        before = stream.copy() if hasattr(stream, "copy") else None
        try:
            piece = stream.decompress(rest)
        except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
            byte = at - len(rest) + _good(before, rest)
            raise _damaged(blob.url, byte, f"damaged compressed data: {error}") from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise _damaged(blob.url, at - len(rest), f"damaged compressed data: {error}") from None
        fresh, rest = stream.eof, stream.unused_data if stream.eof else b""
        if fresh:
            stream = new()
        if piece:
            yield piece
    if not fresh or not blob.size:
        raise _damaged(blob.url, blob.size, "the compressed file ends here, in the middle of its data")


def _good(stream: Any, piece: bytes) -> int:
    """How many bytes of a piece are sound, where that can be found out."""
    if stream is None:
        return 0
    for n in range(len(piece)):
        try:
            stream.decompress(piece[n : n + 1])
        except zlib.error:
            return n
    return 0


def _damaged(url: str, byte: int, problem: str) -> DataError:
    return DataError(f"{shown(url)}: byte {byte}: {problem}", shard=shown(url), byte=byte)
