"""Where every sample of one WebDataset shard lies: found by a walk once, then kept in a file beside the shard.

Grouping is webdataset's: consecutive members with one key are a sample, extensions are in lower case.
The file begins with a line of JSON that sums it up, so that the catalog of many shards reads no more than that.
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
_WHOLE_NAME = 100  # bytes from which on a header may not hold all of a name
_PROBES = 4  # members of a remote shard that are held against an index beside it
MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("extension", "<i4")])

Span = tuple[int, int]  # first byte in the shard, length
Numbers = npt.NDArray[np.int64]


def key_and_extension(name: str) -> tuple[str, str] | None:
    """Sample key and lower-cased extension of a member, as webdataset.tariterators.base_plus_ext parts them; None for
    members that belong to no sample, as all hidden files (`._0001.jpg` and `.DS_Store` of a Mac)."""
    if _METADATA.match(name) or name.startswith(".", name.rfind("/") + 1):
        return None
    line = name.find("\n")  # its regular expression finds folders in the first line alone
    start = name.rfind("/", 0, None if line < 0 else line) + 1
    stem, dot, extension = name[start:].partition(".")
    return (name[:start] + stem, extension.lower()) if stem and dot and "/" not in extension else None


@dataclass(frozen=True, slots=True)
class Summary:
    """A shard in few words, all JSON: what the catalog of a data set holds of it."""

    size: int
    """Bytes of the shard."""
    stamp: str
    """The storage's version stamp, which changes when the shard does."""
    samples: int
    fields: dict[str, tuple[int, int]]
    """Extension -> how many samples have it, and its bytes in all of them."""
    digest: str
    """Digest of keys, extensions and sizes, the same wherever the shard lies."""
    fault: BadData | None = None
    """Damage behind the samples that are counted here."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard, in its order.

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
        """Walks the shard. Raises `DataError`: damage, a key that comes back, a member that comes twice.

        `tolerant`: what is certainly whole before the damage is kept instead, and the damage is its `fault`.
        """
        samples, fault = _Samples(blob.url), None
        try:
            samples.collect(tar.walk(blob))
        except tar.Damage as error:
            if not tolerant:
                raise
            fault = BadData.of(error)
            samples.cut()
        keys, extensions = samples.keys, list(samples.extensions)
        starts, table = np.array([*samples.starts, len(samples.table)], np.int64), np.array(samples.table, MEMBER)
        return cls(blob.url, blob.size, blob.stamp, keys, starts, table, extensions, fault)

    @classmethod
    def open(cls, url: str, storage: Storage, *, tolerant: bool = False) -> ShardIndex:
        """The index kept beside the shard, or in the storage's cache (read-only folders, remote shards); made if it is
        absent, damaged or of another shard. Raises as `build` does."""
        index = cls.stored(url, storage)
        if index is None or (index.fault is not None and not tolerant):  # what ends a run is looked at again
            blob = storage.open(url)
            try:
                index = cls.published(blob, storage) or cls.build(blob, tolerant=tolerant)
                if storage.stamp(url) != blob.stamp:
                    raise DataError(f"{shown(url)}: was written to while it was being indexed", shard=shown(url))
            finally:
                blob.close()
            index.keep(storage)
        return index

    @classmethod
    def stored(cls, url: str, storage: Storage) -> ShardIndex | None:
        """The kept index, if it is whole and of the shard as it is now."""
        stamp = storage.stamp(url)
        return next(filter(None, (cls.load(place, url, stamp) for place in places(url, storage))), None)

    @classmethod
    def load(cls, sidecar: Path, url: str, stamp: str | None = None) -> ShardIndex | None:
        """The index in a file, if it is whole and of the shard with this stamp (None: with any)."""
        try:
            return with_file(sidecar, lambda file: cls._read(file, url, stamp))
        except OSError:
            return None

    @classmethod
    def _read(cls, file: BinaryIO, url: str, stamp: str | None = None) -> ShardIndex | None:
        try:
            summary, about = _summary(file.readline(_LONGEST_SUMMARY), url)
            details = file.read()
            if stamp not in (None, summary.stamp) or hashlib.sha256(details).hexdigest() != about["sha256"]:
                return None
            starts = np.frombuffer(details, "<i8", summary.samples + 1).astype(np.int64, copy=False)
            table = np.frombuffer(details, MEMBER, about["members"], starts.nbytes)
            names = json.loads(details[starts.nbytes + table.nbytes :])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(url, summary.size, summary.stamp, names["keys"], starts, table, names["extensions"], summary.fault)

    @classmethod
    def published(cls, blob: Blob, storage: Storage) -> ShardIndex | None:
        """The index that lies beside a remote shard, as packing puts it there, if it can be of the shard: it is of its
        size, and some headers are where it says. (The time in it is that of a file on another machine.)"""
        if not is_remote(blob.url) or "?" in blob.url or compression(blob.url):
            return None
        with suppress(DataError, ConfigError, Outage):  # there is none, or it cannot be had: the shard is walked
            beside = replace(storage, retries=0, patience_s=0).plain(f"{blob.url}{SIDECAR}", keep=False)
            try:
                if beside.size < blob.size:
                    index = cls._read(io.BytesIO(beside.read(0, beside.size)), blob.url)
                    if index is not None and index.fault is None and index._fits(blob):
                        return replace(index, stamp=blob.stamp)
            finally:
                beside.close()
        return None

    def _fits(self, blob: Blob) -> bool:
        """Whether the shard has its first members, its last and some between where this says."""
        ends = self.table["offset"] + self.table["size"]
        if self.size != blob.size or ends.max(initial=0) > blob.size or self.table["offset"].min(initial=512) < 512:
            return False
        rows = np.unique(np.linspace(0, len(self.table) - 1, _PROBES).astype(np.int64))[: len(self.table)]
        return all(self._is_there(blob, row) for row in rows.tolist())

    def _is_there(self, blob: Blob, row: int) -> bool:
        """Whether the shard has the header of a member before its payload."""
        offset, size, kind = self.table[row].tolist()
        told = tar.described(bytes(blob.peek(offset - tar.BLOCK, tar.BLOCK)))
        if told is None or told[1] not in (size, 0):  # 0: too large for the field
            return False
        key = self.keys[int(np.searchsorted(self.starts, row, side="right")) - 1]
        cut = len(told[0].encode("utf-8", "surrogateescape")) >= _WHOLE_NAME or not key.isascii()
        return cut or key_and_extension(told[0]) == (key, self.extensions[kind])

    @classmethod
    def of_before(cls, url: str, storage: Storage, summary: Summary) -> ShardIndex | None:
        """The index that once was summed up so, if it is still kept: the shard may have been damaged since, and copied
        or touched before."""
        kept = filter(None, (cls.load(place, url) for place in places(url, storage)))
        return next((index for index in kept if index.summary.digest == summary.digest), None)

    def cut(self, samples: int) -> ShardIndex:
        """The index of the first `samples` samples alone."""
        starts = self.starts[: samples + 1]
        table = self.table[: starts[-1]]
        extensions = self.extensions[: int(table["extension"].max(initial=-1)) + 1]  # numbered as they came
        return replace(self, keys=self.keys[:samples], starts=starts, table=table, extensions=extensions)

    def keep(self, storage: Storage) -> bool:
        """Saves the index in the first place that takes it; whether there is one."""
        damaged = [_of_damage(self.url, storage) / f"{self.summary.digest}{SIDECAR}"]
        for place in damaged if self.fault else _of_whole(self.url, storage):
            with suppress(OSError):  # read-only or full: the next place, or do without
                self.save(place)
                return True
        return False

    def save(self, sidecar: Path) -> None:
        """Writes the index file, whole or not at all, and the folder for it if need be."""
        names = json.dumps({"keys": self.keys, "extensions": self.extensions}).encode()
        details = self.starts.astype("<i8").tobytes() + self.table.tobytes() + names
        about = {"members": len(self.table), "sha256": hashlib.sha256(details).hexdigest()}
        head = {"format": FORMAT, **asdict(self.summary), **about}
        if self.fault is not None:  # without the place: the shard may be moved, with its index
            head["fault"]["cause"] = self.fault.cause.removeprefix(f"{self.fault.shard}: ")
        line = json.dumps({**head, "check": _check(head)}, separators=(",", ":"))
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
        """Extension -> span of bytes of sample `i`, in stored order."""
        rows = self.table[self.starts[i] : self.starts[i + 1]].tolist()
        return {self.extensions[extension]: (offset, size) for offset, size, extension in rows}

    def field(self, extension: str) -> tuple[Numbers, Numbers]:
        """Offsets and sizes of a field, int64 [n]; both -1 for samples that lack it."""
        found = np.full((2, len(self.keys)), -1, np.int64)
        if extension in self.extensions:
            rows = np.flatnonzero(self.table["extension"] == self.extensions.index(extension))
            samples = np.searchsorted(self.starts, rows, side="right") - 1
            found[:, samples] = self.table["offset"][rows], self.table["size"][rows]
        return found[0], found[1]

    def sizes(self) -> Numbers:
        """Bytes of every sample, all its members together, int64 [n]."""
        return np.diff(np.concatenate([[0], np.cumsum(self.table["size"])])[self.starts])

    @property
    def nbytes(self) -> int:
        """About the memory that it takes."""
        return self.starts.nbytes + self.table.nbytes + sum(map(len, self.keys)) + 64 * len(self.keys)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardIndex):
            return NotImplemented
        same = (self.url, self.summary) == (other.url, other.summary)
        return same and np.array_equal(self.table["offset"], other.table["offset"])


class _Samples:
    """Members as they come, put together to samples."""

    def __init__(self, url: str):
        self.name = shown(url)
        self.keys: list[str] = []
        self.starts: list[int] = []  # of each sample its first row in the table
        self.table: list[tuple[int, int, int]] = []
        self.extensions: dict[str, int] = {}
        self.whole = 0  # samples that are certainly whole, whatever follows

    def collect(self, members: Iterator[tar.Member]) -> None:
        """Raises `tar.Damage`, with the sample's key."""
        numbers: dict[str, int] = {}
        present: set[int] = set()
        for name, offset, size in self._mend(members):
            if (named := key_and_extension(name)) is None:
                continue
            key, extension = named
            kind = self.extensions.setdefault(extension, len(self.extensions))
            if not self.keys or key != self.keys[-1]:
                self.whole = len(self.keys)
                if key in numbers:
                    self._comes_back(key, kind, numbers[key], offset)
                numbers[key] = len(self.keys)
                self.keys.append(key)
                self.starts.append(len(self.table))
                present = set()
            elif kind in present:
                self._fail(offset, key, f"has a second member {extension!r}")
            present.add(kind)
            self.table.append((offset, size, kind))
        self.whole = len(self.keys)

    def _mend(self, members: Iterator[tar.Member]) -> Iterator[tar.Member]:
        """The members; their damage names the key of a sample, not of a member."""
        try:
            yield from members
        except tar.Damage as error:
            named = key_and_extension(error.key) if error.key is not None else None
            error.key = named and named[0]
            if error.key is not None and self.keys and error.key != self.keys[-1]:
                self.whole = len(self.keys)  # another sample follows the last one
            raise

    def _comes_back(self, key: str, kind: int, first: int, offset: int) -> NoReturn:
        rows = self.table[self.starts[first] : self.starts[first + 1] if first + 1 < len(self.starts) else None]
        if kind not in (row[2] for row in rows):
            self.whole = first  # its members are scattered: it was not whole
        self._fail(offset, key, "comes back after another one; a sample's members must lie together")

    def _fail(self, offset: int, key: str, problem: str) -> NoReturn:
        raise tar.Damage(f"{self.name}: byte {offset}: key {key!r} {problem}", shard=self.name, key=key, byte=offset)

    def cut(self) -> None:
        """Drops all but the whole samples."""
        if self.whole < len(self.keys):
            del self.table[self.starts[self.whole] :], self.keys[self.whole :], self.starts[self.whole :]
        used = {row[2] for row in self.table}
        self.extensions = {name: number for name, number in self.extensions.items() if number in used}


def summary(url: str, storage: Storage) -> Summary | None:
    """What the kept index says, its details left unread; None if there is none of the shard as it is now."""
    stamp = storage.stamp(url)
    for place in places(url, storage):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found, _ = _summary(with_file(place, lambda file: file.readline(_LONGEST_SUMMARY)), url)
            if found.stamp == stamp:
                return found
    return None


def places(url: str, storage: Storage) -> list[Path]:
    """Where indexes of a shard may be kept, best first. Those of it damaged replace neither each other nor what is
    known of the whole one: a run may still need what it began with."""
    return [*_of_whole(url, storage), *sorted(_of_damage(url, storage).glob(f"*{SIDECAR}"))]


def _of_whole(url: str, storage: Storage) -> list[Path]:
    cached = _in_cache(url, storage).with_suffix(SIDECAR)
    return [cached] if is_remote(url) or url.startswith("pipe:") else [Path(local_path(url) + SIDECAR), cached]


def _of_damage(url: str, storage: Storage) -> Path:
    return _in_cache(url, storage).with_suffix(".damaged")


def _in_cache(url: str, storage: Storage) -> Path:
    place = absolute(url).encode("utf-8", "surrogateescape")
    return storage.cache / "indexes" / hashlib.sha256(place).hexdigest()[:32]


def _summary(line: bytes, url: str) -> tuple[Summary, dict[str, Any]]:
    """The first line of an index file: the summary, and what is said of the details. ValueError, ... if damaged."""
    head = json.loads(line)
    if head.pop("check") != _check(head) or head.pop("format") != FORMAT:
        raise ValueError("damaged or of another version")
    about = {name: head.pop(name) for name in ("members", "sha256")}
    fields = {name: (count, size) for name, (count, size) in head.pop("fields").items()}
    if (fault := head.pop("fault")) is not None:
        fault = BadData(shown(url), fault["key"], fault["byte"], f"{shown(url)}: {fault['cause']}")
    return Summary(**head, fields=fields, fault=fault), about


def _check(head: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:16]
