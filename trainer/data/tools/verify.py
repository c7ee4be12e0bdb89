"""Verifies a shard: reads every byte and compares it with everything that is known of the shard."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import decode, images
from trainer.data.external_indexes import ENERGON, ENERGON_INFO, SIZES, WIDS, ExternalCounts, energon_offsets, split
from trainer.data.index import FORMAT, ShardIndex, places
from trainer.data.storage import Blob, Storage, is_remote, shown
from trainer.data.storage.urls import PIPE, local_path
from trainer.data.tar import BLOCK
from trainer.data.tools.write import FORMAT as DATASET
from trainer.errors import DataError, OnecurveError

_CHUNK = 4 << 20
_LONGEST_LINE = 64 << 20


@dataclass
class Verdict:
    """The verdict on one shard: its problems, one line each; its contents; fields that cannot be decoded here."""

    problems: list[str] = field(default_factory=list)
    samples: int = 0
    size: int = 0
    fields: dict[str, int] = field(default_factory=dict)
    not_decoded: set[str] = field(default_factory=set)


def verify(url: str, storage: Storage, decode: bool = False) -> Verdict:
    """Reads a whole shard and checks its structure, its index, its checksum in the data set, and other tools' indexes;
    with `decode` also whether its members are what their extensions say."""
    verdict, name = Verdict(), shown(url)
    try:
        with closing(storage.open(url)) as blob:
            index = ShardIndex.build(blob, tolerant=True)
            if index.fault is not None:
                verdict.problems.append(index.fault.cause)
            verdict.samples, verdict.size = len(index.keys), blob.size
            verdict.fields = {name: count for name, (count, _) in index.summary.fields.items()}
            description = _read_description(url, storage, verdict.problems)
            verdict.problems += _check_bytes(url, blob, storage, description)
            verdict.problems += _check_indexes(index, storage)
            if index.fault is None:  # otherwise these are not to blame
                verdict.problems += _check_external_indexes(blob, index, storage)
            if decode:
                verdict.problems += _check_payloads(blob, index, description, verdict.not_decoded)
    except DataError as error:
        verdict.problems.append(str(error))
    verdict.problems = [text if text.startswith(name) else f"{name}: {text}" for text in verdict.problems]
    return verdict


def _read_description(url: str, storage: Storage, problems: list[str]) -> dict[str, Any]:
    """Returns the `dataset.json` that packing wrote next to a shard; {} if there is none."""
    place = posixpath.join(split(url)[0], "dataset.json")
    if url.startswith(PIPE) or not (is_remote(url) or Path(local_path(place)).exists()):
        return {}
    try:
        description = _json_file(place, storage, _times(split(url)[0]))
        is_onecurve = isinstance(description, dict) and description.get("format") == DATASET
        return description if is_onecurve else {}
    except (OnecurveError, ValueError) as error:
        if not is_remote(url):  # there it may just not exist
            problems.append(f"{shown(place)} beside it cannot be read: {error}")
        return {}


def _times(folder: str) -> tuple[int, ...]:
    """Returns the modification times of the files that describe the shards of a folder; () for a remote one. They are
    part of the key under which those files are cached."""
    if is_remote(folder):
        return ()
    paths = (Path(local_path(posixpath.join(folder, name))) for name in ("dataset.json", ENERGON_INFO, WIDS, SIZES))
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


@lru_cache(maxsize=8)
def _json_file(place: str, storage: Storage, times: tuple[int, ...]) -> Any:
    with closing(storage.plain(place, keep=False)) as blob:
        return json.loads(bytes(blob.read(0, blob.size)))


def _check_bytes(url: str, blob: Blob, storage: Storage, description: dict[str, Any]) -> Iterator[str]:
    """Reads the whole file as it is stored; yields a problem if its checksum is wrong."""
    digest, stored_file = hashlib.sha256(), blob if url.startswith(PIPE) else storage.plain(url, keep=False)
    try:
        for at in range(0, stored_file.size, _CHUNK):
            size = min(_CHUNK, stored_file.size - at)
            stored_file.prefetch(at + size, min(_CHUNK, stored_file.size - at - size))
            digest.update(stored_file.read(at, size))
    finally:
        if stored_file is not blob:
            stored_file.close()
    listed_digest = description.get("sha256", {}).get(split(url)[1])
    if listed_digest not in (None, digest.hexdigest()):
        yield "its checksum is not the one in dataset.json; payloads have changed"


def _check_indexes(index: ShardIndex, storage: Storage) -> Iterator[str]:
    """Yields a problem for each index of the current shard that does not match it."""
    for place in places(index.url, storage):
        with suppress(FileNotFoundError):
            try:
                with open(place, "rb") as file:
                    header = json.loads(file.readline(_LONGEST_LINE))
                is_outdated = (header["format"], header["stamp"]) != (FORMAT, index.stamp)  # rebuilt when it is needed
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                yield f"its index {place} cannot be read: {error.strerror}"
                continue
            except (ValueError, KeyError, TypeError):
                is_outdated = False
            if not is_outdated and ShardIndex.load(place, index.url, index.stamp) != index:
                yield f"is not what its index says; delete {place} if the shard is right"


class _ExternalIndexes(ExternalCounts):
    """The counts in all indexes of other tools, not only in the first one that is trusted."""

    def all(self, blob: Blob) -> Iterator[tuple[str, int | None, int]]:
        """Yields the place of each index, and the size and the samples of the shard that it lists."""
        folder, name = split(blob.url)
        shard_mtime_ns = None if is_remote(blob.url) else Path(local_path(blob.url)).stat().st_mtime_ns
        for listing in self.listings(folder):
            if name in listing.shards and not (
                shard_mtime_ns and listing.mtime_ns and listing.mtime_ns < shard_mtime_ns
            ):
                samples, size = listing.shards[name]
                yield listing.place, size, samples


@lru_cache(maxsize=8)
def _external_indexes(storage: Storage, folder: str, times: tuple[int, ...]) -> _ExternalIndexes:
    return _ExternalIndexes(storage)


def _check_external_indexes(blob: Blob, index: ShardIndex, storage: Storage) -> Iterator[str]:
    """Yields what indexes of other tools get wrong. Ignores those older than the shard: they describe another one."""
    if blob.url.startswith(PIPE):
        return
    folder, _ = split(blob.url)
    for place, size, samples in _external_indexes(storage, folder, _times(folder)).all(blob):
        if samples != len(index.keys):
            yield f"has {len(index.keys)} samples, but {place} says {samples}"
        if size not in (None, blob.size):
            yield f"has {blob.size} bytes, but {place} says {size}"
    if is_remote(blob.url):
        return
    shard = Path(local_path(blob.url))
    energon = Path(f"{shard}{ENERGON}")
    with suppress(FileNotFoundError):
        if energon.stat().st_mtime_ns < shard.stat().st_mtime_ns:
            return
        try:
            offsets = energon_offsets(energon)
        except ValueError:
            offsets = np.zeros(0, np.int64)
        if not _fits(offsets, index):
            yield f"its samples do not begin where {energon} says"


def _fits(offsets: np.ndarray[Any, np.dtype[np.int64]], index: ShardIndex) -> bool:
    """Returns whether each sample begins between the end of the one before and its own first payload."""
    if len(offsets) != len(index.keys) + 1:
        return False
    ends = index.table["offset"] + -(-index.table["size"] // BLOCK) * BLOCK
    first, last = index.table["offset"][index.starts[:-1]], ends[index.starts[1:] - 1]
    ends_fit = bool(np.all(offsets[1:] >= last)) and (not len(offsets) or bool(offsets[0] >= 0))
    return ends_fit and bool(np.all(offsets[:-1] <= first - BLOCK))


def _check_payloads(blob: Blob, index: ShardIndex, description: dict[str, Any], not_decoded: set[str]) -> Iterator[str]:
    """Yields a problem for each member that is not what its extension says."""
    vocabulary = description.get("tokenizer", {}).get("vocab_size") or (1 << 32)
    name = shown(blob.url)
    for i, key in enumerate(index.keys):
        for extension, (at, size) in index.members(i).items():
            kind = decode.kind(extension)
            if kind not in CHECKS and not decode.is_known(extension):
                not_decoded.add(kind)
                continue
            if kind in images.EXTENSIONS:
                images.require_pillow("--decode")
            content = bytes(blob.read(at, size))
            try:
                if kind in CHECKS:
                    CHECKS[kind](decode.unpacked(extension, content), vocabulary)
                else:
                    decode.decode(extension, content)
            except ImportError:
                not_decoded.add(kind)
            except Exception as error:  # whatever the libraries raise
                cause = str(error).partition("\n")[0] or type(error).__name__
                yield f"{name}: byte {at}: sample {key!r}: member {extension!r} cannot be decoded: {cause}"


def _text(content: bytes, vocabulary: int) -> None:
    content.decode()


def _json_lines(content: bytes, vocabulary: int) -> None:
    for line in content.splitlines():
        if line.strip():
            json.loads(line)


def _array(content: bytes, vocabulary: int) -> None:
    decode.array(content)
    file = io.BytesIO(content)
    np.load(file, allow_pickle=False)
    if file.read(1):
        raise ValueError("bytes follow the array")


def _ids(dtype: str) -> Callable[[bytes, int], None]:
    def check(content: bytes, vocabulary: int) -> None:
        ids = np.frombuffer(content, dtype)  # ValueError: not a whole number of ids
        if len(ids) and int(ids.max()) >= vocabulary:
            raise ValueError(f"token {int(ids.max())}, but the vocabulary has {vocabulary}")

    return check


# By the last part of an extension: checks that are stricter than decoding. Each raises any exception for content that
# is not decodable.
CHECKS: dict[str, Callable[[bytes, int], None]] = {
    "jsonl": _json_lines,
    "npy": _array,
    "u16": _ids("<u2"),
    "u32": _ids("<u4"),
    **dict.fromkeys(("md", "html"), _text),
}
