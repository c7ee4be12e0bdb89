"""The index of a WebDataset shard: where every sample lies. It is made once, then kept in a file beside the shard.

Grouping is webdataset's: consecutive members with one key are a sample, extensions are in lower case.
The file begins with a summary, a line of JSON: the catalog of many shards reads no more than that.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from trainer.data import tar
from trainer.data.bad_data import BadData
from trainer.data.storage import Blob, Storage, is_remote, shown
from trainer.data.storage.unpack import compression
from trainer.data.storage.urls import absolute, local_path
from trainer.errors import ConfigError, DataError, Outage
from trainer.files import replace_file, with_file

FORMAT = "onecurve-index-2"
SIDECAR = ".index"
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
_LONGEST_SUMMARY = 64 << 20
_WHOLE_NAME = 100  # a header may not hold all of a name of this many bytes or more
_PROBES = 4  # members of a remote shard that are compared with the index beside it
MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("extension", "<i4")])

Span = tuple[int, int]  # first byte in the shard, length
Numbers = npt.NDArray[np.int64]


def key_and_extension(name: str) -> tuple[str, str] | None:
    """Returns sample key and lower-case extension of a member, as webdataset.tariterators.base_plus_ext does; None for
    members that belong to no sample, such as hidden files (`._0001.jpg` and `.DS_Store` of a Mac)."""
    if _METADATA.match(name) or name.startswith(".", name.rfind("/") + 1):
        return None
    line = name.find("\n")  # webdataset's regular expression finds folders in the first line alone
    start = name.rfind("/", 0, None if line < 0 else line) + 1
    stem, dot, extension = name[start:].partition(".")
    return (name[:start] + stem, extension.lower()) if stem and dot and "/" not in extension else None


@dataclass(frozen=True, slots=True)
class Summary:
    """Sums up a shard, all JSON: what the catalog of a data set holds of it."""

    size: int
    """Bytes of the shard."""
    stamp: str
    """The storage's version stamp, which changes when the shard does."""
    samples: int
    fields: dict[str, tuple[int, int]]
    """Extension -> number of samples that have it, and its bytes in all of them."""
    digest: str
    """Digest of keys, extensions and sizes, the same wherever the shard lies."""
    fault: BadData | None = None
    """Damage after the samples that are counted here."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Lists the samples of one shard, in its order.

    `keys` [n]. Members `starts`[i] up to `starts`[i + 1] (int64 [n + 1]) of `table` are those of sample i: records of
    offset, size (bytes of the shard) and extension (number in `extensions`). `fault`: damage that ends them.
    """

    url: str
    size: int
    stamp: str
    keys: list[str]
    starts: Numbers
    table: npt.NDArray[Any]
    extensions: list[str]
    fault: BadData | None = None

    @classmethod
    def build(cls, blob: Blob, *, tolerant: bool = False) -> ShardIndex:
        """Builds the index by a walk over the shard. Raises `DataError` for damage, a key that comes back and a member
        that comes twice. With `tolerant` the samples before the damage are kept, and the damage is the index's `fault`.
        """
        samples, fault = _Samples(blob.url), None
        try:
            samples.collect(tar.walk(blob))
        except tar.Damage as error:
            if not tolerant:
                raise
            fault = BadData.of(error)
            samples.drop_incomplete()
        keys, extensions = samples.keys, list(samples.extensions)
        starts, table = np.array([*samples.starts, len(samples.table)], np.int64), np.array(samples.table, MEMBER)
        return cls(blob.url, blob.size, blob.stamp, keys, starts, table, extensions, fault)

    @classmethod
    def open(cls, url: str, storage: Storage, *, tolerant: bool = False) -> ShardIndex:
        """Loads the index kept beside the shard, or in the storage's cache (read-only folders, remote shards); builds
        it if it is absent, damaged or of another shard. Raises what `build` raises."""
        index = cls.load_stored(url, storage)
        if index is None or (index.fault is not None and not tolerant):  # damage that would end a run is checked again
            blob = storage.open(url)
            try:
                index = cls.load_published(blob, storage) or cls.build(blob, tolerant=tolerant)
                if storage.stamp(url) != blob.stamp:
                    raise DataError(f"{shown(url)}: was written to while it was being indexed", shard=shown(url))
            finally:
                blob.close()
            index.keep(storage)
        return index

    @classmethod
    def load_stored(cls, url: str, storage: Storage) -> ShardIndex | None:
        """Loads the kept index, if it is whole and of the shard as it is now; else returns None."""
        stamp = storage.stamp(url)
        return next(filter(None, (cls.load(place, url, stamp) for place in places(url, storage))), None)

    @classmethod
    def load(cls, sidecar: Path, url: str, stamp: str | None = None) -> ShardIndex | None:
        """Loads the index from a file, if it is whole and of the shard with this stamp (None: any); else returns
        None."""
        try:
            return with_file(sidecar, lambda file: cls._read(file, url, stamp))
        except OSError:
            return None

    @classmethod
    def _read(cls, file: BinaryIO, url: str, stamp: str | None = None) -> ShardIndex | None:
        try:
            summary, metadata = _parse_summary(file.readline(_LONGEST_SUMMARY), url)
            details = file.read()
            if stamp not in (None, summary.stamp) or hashlib.sha256(details).hexdigest() != metadata["sha256"]:
                return None
            starts = np.frombuffer(details, "<i8", summary.samples + 1).astype(np.int64, copy=False)
            table = np.frombuffer(details, MEMBER, metadata["members"], starts.nbytes)
            texts = json.loads(details[starts.nbytes + table.nbytes :])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(url, summary.size, summary.stamp, texts["keys"], starts, table, texts["extensions"], summary.fault)

    @classmethod
    def load_published(cls, blob: Blob, storage: Storage) -> ShardIndex | None:
        """Loads the index that packing put beside a remote shard, if it fits: it has the shard's size, and some headers
        are where it says. (Its time is not compared: it is of a file on another machine.)"""
        if not is_remote(blob.url) or "?" in blob.url or compression(blob.url):
            return None
        with suppress(DataError, ConfigError, Outage):  # it does not exist or cannot be read: the shard is walked
            sidecar = replace(storage, retries=0, patience_s=0).plain(f"{blob.url}{SIDECAR}", keep=False)
            try:
                if sidecar.size < blob.size:
                    index = cls._read(io.BytesIO(sidecar.read(0, sidecar.size)), blob.url)
                    if index is not None and index.fault is None and index._fits(blob):
                        return replace(index, stamp=blob.stamp)
            finally:
                sidecar.close()
        return None

    def _fits(self, blob: Blob) -> bool:
        """Returns whether the shard's first and last member and some in between are where this index says."""
        ends = self.table["offset"] + self.table["size"]
        if self.size != blob.size or ends.max(initial=0) > blob.size or self.table["offset"].min(initial=512) < 512:
            return False
        rows = np.unique(np.linspace(0, len(self.table) - 1, _PROBES).astype(np.int64))[: len(self.table)]
        return all(self._has_header(blob, row) for row in rows.tolist())

    def _has_header(self, blob: Blob, row: int) -> bool:
        """Returns whether the shard has the header of a member before its payload."""
        offset, size, extension = self.table[row].tolist()
        header = tar.described(bytes(blob.peek(offset - tar.BLOCK, tar.BLOCK)))
        if header is None or header[1] not in (size, 0):  # 0: too large for the field
            return False
        key = self.keys[int(np.searchsorted(self.starts, row, side="right")) - 1]
        is_name_incomplete = len(header[0].encode("utf-8", "surrogateescape")) >= _WHOLE_NAME or not key.isascii()
        return is_name_incomplete or key_and_extension(header[0]) == (key, self.extensions[extension])

    @classmethod
    def load_former(cls, url: str, storage: Storage, summary: Summary) -> ShardIndex | None:
        """Loads the kept index with this summary's digest, if there is one: the shard may have been damaged, copied or
        touched since."""
        indexes = filter(None, (cls.load(place, url) for place in places(url, storage)))
        return next((index for index in indexes if index.summary.digest == summary.digest), None)

    def truncate(self, samples: int) -> ShardIndex:
        """Returns the index of the first `samples` samples alone."""
        starts = self.starts[: samples + 1]
        table = self.table[: starts[-1]]
        extensions = self.extensions[: int(table["extension"].max(initial=-1)) + 1]  # numbered in order of appearance
        return replace(self, keys=self.keys[:samples], starts=starts, table=table, extensions=extensions)

    def keep(self, storage: Storage) -> bool:
        """Saves the index in the first place that can be written; returns whether there is one."""
        damaged_places = [_damaged_folder(self.url, storage) / f"{self.summary.digest}{SIDECAR}"]
        for place in damaged_places if self.fault else _whole_places(self.url, storage):
            with suppress(OSError):  # read-only or full: try the next place, or do without
                self.save(place)
                return True
        return False

    def save(self, sidecar: Path) -> None:
        """Writes the index file, whole or not at all, and creates its folder."""
        texts = json.dumps({"keys": self.keys, "extensions": self.extensions}).encode()
        details = self.starts.astype("<i8").tobytes() + self.table.tobytes() + texts
        metadata = {"members": len(self.table), "sha256": hashlib.sha256(details).hexdigest()}
        head = {"format": FORMAT, **asdict(self.summary), **metadata}
        if self.fault is not None:  # without the shard's path: it may be moved, with its index
            head["fault"]["cause"] = self.fault.cause.removeprefix(f"{self.fault.shard}: ")
        line = json.dumps({**head, "check": _checksum(head)}, separators=(",", ":"))
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        replace_file(sidecar, line.encode() + b"\n" + details)

    @cached_property
    def summary(self) -> Summary:
        counts = np.bincount(self.table["extension"], minlength=len(self.extensions)).tolist()
        sizes = np.bincount(self.table["extension"], self.table["size"], len(self.extensions))
        fields = {e: (n, int(s)) for e, n, s in zip(self.extensions, counts, sizes, strict=True)}
        return Summary(self.size, self.stamp, len(self.keys), dict(sorted(fields.items())), self._digest(), self.fault)

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps([self.keys, self.extensions]).encode())
        for numbers in (self.starts, self.table["size"], self.table["extension"]):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()[:32]

    def members(self, i: int) -> dict[str, Span]:
        """Returns the members of sample `i`, in stored order: extension -> span of bytes."""
        rows = self.table[self.starts[i] : self.starts[i + 1]].tolist()
        return {self.extensions[extension]: (offset, size) for offset, size, extension in rows}

    def field(self, extension: str) -> tuple[Numbers, Numbers]:
        """Returns offsets and sizes of a field, int64 [n]; both are -1 for samples that lack it."""
        spans = np.full((2, len(self.keys)), -1, np.int64)
        if extension in self.extensions:
            rows = np.flatnonzero(self.table["extension"] == self.extensions.index(extension))
            samples = np.searchsorted(self.starts, rows, side="right") - 1
            spans[:, samples] = self.table["offset"][rows], self.table["size"][rows]
        return spans[0], spans[1]

    def sizes(self) -> Numbers:
        """Returns the bytes of every sample, all its members together, int64 [n]."""
        return np.diff(np.concatenate([[0], np.cumsum(self.table["size"])])[self.starts])

    @property
    def nbytes(self) -> int:
        """Returns about how much memory the index takes."""
        return self.starts.nbytes + self.table.nbytes + sum(map(len, self.keys)) + 64 * len(self.keys)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardIndex):
            return NotImplemented
        is_same_summary = (self.url, self.summary) == (other.url, other.summary)
        return is_same_summary and np.array_equal(self.table["offset"], other.table["offset"])


class _Samples:
    """Groups consecutive members into samples."""

    def __init__(self, url: str):
        self.name = shown(url)
        self.keys: list[str] = []
        self.starts: list[int] = []  # first row of each sample in the table
        self.table: list[tuple[int, int, int]] = []
        self.extensions: dict[str, int] = {}
        self.whole = 0  # samples that are certainly whole, whatever follows

    def collect(self, members: Iterator[tar.Member]) -> None:
        """Groups all members. Raises `tar.Damage`, with the sample's key."""
        numbers: dict[str, int] = {}
        present: set[int] = set()
        for name, offset, size in self._translate_damage(members):
            if (parts := key_and_extension(name)) is None:
                continue
            key, extension = parts
            kind = self.extensions.setdefault(extension, len(self.extensions))
            if not self.keys or key != self.keys[-1]:
                self.whole = len(self.keys)
                if key in numbers:
                    self._fail_on_repeated_key(key, kind, numbers[key], offset)
                numbers[key] = len(self.keys)
                self.keys.append(key)
                self.starts.append(len(self.table))
                present = set()
            elif kind in present:
                self._fail(offset, key, f"has a second member {extension!r}")
            present.add(kind)
            self.table.append((offset, size, kind))
        self.whole = len(self.keys)

    def _translate_damage(self, members: Iterator[tar.Member]) -> Iterator[tar.Member]:
        """Yields the members; changes the key in their damage from a member's name to a sample's key."""
        try:
            yield from members
        except tar.Damage as error:
            parts = key_and_extension(error.key) if error.key is not None else None
            error.key = parts and parts[0]
            if error.key is not None and self.keys and error.key != self.keys[-1]:
                self.whole = len(self.keys)  # another sample follows the last one
            raise

    def _fail_on_repeated_key(self, key: str, kind: int, first: int, offset: int) -> NoReturn:
        rows = self.table[self.starts[first] : self.starts[first + 1] if first + 1 < len(self.starts) else None]
        if kind not in (row[2] for row in rows):
            self.whole = first  # the sample's members are scattered: it was not whole
        self._fail(offset, key, "comes back after another one; a sample's members must lie together")

    def _fail(self, offset: int, key: str, problem: str) -> NoReturn:
        raise tar.Damage(f"{self.name}: byte {offset}: key {key!r} {problem}", shard=self.name, key=key, byte=offset)

    def drop_incomplete(self) -> None:
        """Drops all but the whole samples."""
        if self.whole < len(self.keys):
            del self.table[self.starts[self.whole] :], self.keys[self.whole :], self.starts[self.whole :]
        used = {row[2] for row in self.table}
        self.extensions = {name: number for name, number in self.extensions.items() if number in used}


def summary(url: str, storage: Storage) -> Summary | None:
    """Reads the summary of the kept index, without its details; returns None if none is of the shard as it is now."""
    stamp = storage.stamp(url)
    for place in places(url, storage):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored_summary, _ = _parse_summary(with_file(place, lambda file: file.readline(_LONGEST_SUMMARY)), url)
            if stored_summary.stamp == stamp:
                return stored_summary
    return None


def places(url: str, storage: Storage) -> list[Path]:
    """Returns the paths where indexes of a shard may be kept, best first. Indexes of the damaged shard replace neither
    each other nor the one of the whole shard: a run may still need the one that it began with."""
    return [*_whole_places(url, storage), *sorted(_damaged_folder(url, storage).glob(f"*{SIDECAR}"))]


def _whole_places(url: str, storage: Storage) -> list[Path]:
    cached = _cache_path(url, storage).with_suffix(SIDECAR)
    return [cached] if is_remote(url) or url.startswith("pipe:") else [Path(local_path(url) + SIDECAR), cached]


def _damaged_folder(url: str, storage: Storage) -> Path:
    return _cache_path(url, storage).with_suffix(".damaged")


def _cache_path(url: str, storage: Storage) -> Path:
    place = absolute(url).encode("utf-8", "surrogateescape")
    return storage.cache / "indexes" / hashlib.sha256(place).hexdigest()[:32]


def _parse_summary(line: bytes, url: str) -> tuple[Summary, dict[str, Any]]:
    """Parses the first line of an index file: the summary, and count and checksum of the details. Raises ValueError,
    KeyError, TypeError or AttributeError if it is damaged."""
    head = json.loads(line)
    if head.pop("check") != _checksum(head) or head.pop("format") != FORMAT:
        raise ValueError("damaged or of another version")
    metadata = {name: head.pop(name) for name in ("members", "sha256")}
    fields = {name: (count, size) for name, (count, size) in head.pop("fields").items()}
    if (fault := head.pop("fault")) is not None:
        fault = BadData(shown(url), fault["key"], fault["byte"], f"{shown(url)}: {fault['cause']}")
    return Summary(**head, fields=fields, fault=fault), metadata


def _checksum(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:16]
