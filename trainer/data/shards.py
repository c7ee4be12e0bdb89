"""A whole data set: the samples of all its shards in a row, with random access.

Only a summary of every shard is held. The index of a shard is opened when one of its samples is read, so a rank pays
only for the shards that it reads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from trainer.data import index
from trainer.data.bad_data import BadData
from trainer.data.external_indexes import ExternalCounts
from trainer.data.index import Numbers, ShardIndex, Summary
from trainer.data.recent_cache import open_room, share_descriptors
from trainer.data.shard_spec import expand, file_name
from trainer.data.shared_work import ALONE, WorkSharing
from trainer.data.storage import Storage, is_remote, shown
from trainer.errors import ConfigError, DataError

OPEN_BYTES = 1 << 30  # bytes of indexes that are kept open

Content = bytes | memoryview


class _Shard:
    """Holds an open shard: its index as plain arrays, and its bytes."""

    def __init__(self, index: ShardIndex, stamp: str, storage: Storage):
        self.index, self.keys, self.blob = index, index.keys, storage.open(index.url)
        if self.blob.stamp != stamp:
            raise _changed_error(index.url)
        # Views of arrays: an item of one is an int, four times as fast as numpy's.
        self.starts = index.starts.data
        self.offsets = np.ascontiguousarray(index.table["offset"]).data
        self.sizes = np.ascontiguousarray(index.table["size"]).data
        self.names = np.array(index.extensions, object)[index.table["extension"]].tolist()
        self.nbytes = 2 * index.nbytes
        self._fields: dict[str, tuple[Numbers, Numbers]] = {}

    def field(self, name: str) -> tuple[Numbers, Numbers]:
        """Returns offsets and sizes of a member of every sample, -1 where a sample lacks it."""
        if name not in self._fields:
            self._fields[name] = self.index.field(name)
        return self._fields[name]

    def read(self, i: int, at: int, size: int) -> Content:
        """Reads `size` bytes from byte `at`, which are of sample `i`. Raises DataError, which names the sample."""
        try:
            return self.blob.read(at, size)
        except DataError as error:
            shard, key = shown(self.index.url), self.keys[i]
            cause = str(error).removeprefix(f"{shard}: ")
            raise DataError(f"{shard}: sample {key!r}: {cause}", shard=shard, key=key, byte=error.byte) from error

    def member(self, i: int, name: str) -> Content:
        """Reads one member of sample `i`. Raises DataError, which names the sample."""
        offsets, sizes = self.field(name)
        if (at := int(offsets[i])) < 0:
            shard, extensions = shown(self.index.url), ", ".join(sorted(self.index.members(i)))
            raise DataError(
                f"{shard}: sample {self.keys[i]!r} has no {name!r}; it has: {extensions}", shard=shard, key=self.keys[i]
            )
        return self.read(i, at, int(sizes[i]))


class Shards:
    """Reads samples 0..n-1, in the order of the shards. It is thread-safe and can be sent to another process.

    `n`: number of samples. `bytes`: of the member `field` in all of them, or of all members. `starts`: int64 [shards +
    1], the first sample of each shard. `urls`: as the user wrote them. `remote`: whether any comes over the network.
    `fingerprint`: of names, counts, keys and sizes, the same wherever the shards lie. `faults`: damaged shards.
    `summaries`: one of each shard, which later attempts of a run compare. `damaged_since`: numbers of the shards that
    were damaged since an earlier attempt; they are read as they were.
    """

    def __init__(
        self,
        urls: Sequence[str],
        summaries: Sequence[Summary],
        field: str | None,
        storage: Storage,
        *,
        tolerant: bool = False,
        damaged_since: Iterable[int] = (),
    ):
        self.urls, self.summaries, self.field, self._storage = list(urls), list(summaries), field, storage
        self._tolerant, self.damaged_since = tolerant, frozenset(damaged_since)
        self.faults = [summary.fault for summary in summaries if summary.fault is not None]
        self.starts = np.cumsum([0, *(summary.samples for summary in summaries)], dtype=np.int64)
        self.n = int(self.starts[-1])
        self.bytes = sum(size for summary in summaries for _, size in _fields(summary, field)) or sum(
            summary.size for summary in summaries
        )
        self.fingerprint = self._fingerprint(summaries)
        self._first = self.starts.tolist()
        self.remote = any(map(is_remote, self.urls))
        self._stamps: dict[int, str] = {}  # stamps of the shards that this process has opened
        self._open: OrderedDict[int, _Shard] = OrderedDict()  # least recently used first
        self._open_bytes = 0  # bytes of their indexes
        self._lock = threading.Lock()
        share_descriptors(self)

    @classmethod
    def open(
        cls,
        spec: str | Sequence[str],
        field: str | None,
        storage: Storage,
        *,
        key: str = "data.shards",
        tolerant: bool = False,
        earlier_summaries: Sequence[tuple[str, Summary]] = (),
        team: WorkSharing = ALONE,
        patient: bool = False,
    ) -> Shards:
        """Opens the shards that `spec` means (see `expand`) on the first rank of `team`. Each rank indexes its part of
        those without an index.

        `field`: a member that all samples must have; None: no such member, and other tools' indexes are believed, so
        that a shard is not walked before it is read. `tolerant`: the samples before the damage in a shard are used.
        `earlier_summaries`: file names and summaries of the shards in an earlier attempt of the run; if these are the
        same shards, those that were damaged, repaired or recounted since are read as they were then. `patient`: wait
        for a server that does not answer; else raise at once.
        Raises ConfigError with all problems on all ranks; its exit code is DataError's if damage is the only problem.
        """
        urls: list[str] = team.run_on_first(lambda: expand(spec, key, allow_pipe=storage.allow_pipe))
        field, impatient_storage = field and field.lower(), replace(storage, patience_s=storage.patience_s * patient)
        inspect = partial(
            _inspect_shard,
            storage=impatient_storage,
            field=field,
            tolerant=tolerant,
            counts=ExternalCounts(impatient_storage),
        )
        is_same_data = [name for name, _ in earlier_summaries] == list(map(file_name, urls))
        expected: Sequence[Summary | None] = (
            [summary for _, summary in earlier_summaries] if is_same_data else [None] * len(urls)
        )
        reports = team.share("indexes of shards", list(zip(urls, expected, strict=True)), inspect)
        summaries = [from_json(report["summary"]) for report in reports]
        damaged_since = [number for number, report in enumerate(reports) if report["damaged_since"]]
        shards = cls(urls, summaries, field, storage, tolerant=tolerant, damaged_since=damaged_since)
        shards._stamps.update((number, reports[number]["stamp"]) for number in range(team.rank, len(urls), team.size))
        if not shards.n:
            raise ConfigError(f"{key}: no samples in {', '.join(map(shown, urls[:8]))}")
        return shards

    def _fingerprint(self, summaries: Sequence[Summary]) -> str:
        digest = hashlib.sha256()
        for url, summary in zip(self.urls, summaries, strict=True):
            content = [summary.samples, summary.digest or summary.size, list(_fields(summary, self.field))]
            digest.update(json.dumps([file_name(url), *content]).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def locate(self, v: int) -> tuple[int, int]:
        """Returns the number of the shard of sample `v`, and the sample's number in it."""
        if not 0 <= v < self.n:
            raise IndexError(f"sample {v} of {self.n}")
        shard = bisect_right(self._first, v) - 1
        return shard, v - self._first[shard]

    def locate_many(self, samples: Numbers) -> Iterator[tuple[int, int]]:
        """Locates each of `samples`."""
        numbers = np.searchsorted(self.starts, samples, side="right") - 1
        return zip(numbers.tolist(), (samples - self.starts[numbers]).tolist(), strict=True)

    def name(self, v: int) -> tuple[str, str]:
        """Returns the file name of the shard and the key of sample `v`."""
        shard, i = self.locate(v)
        return file_name(self.urls[shard]), self._shard(shard, i).keys[i]

    def path(self, v: int) -> str:
        """Returns the shard of sample `v`, as the user wrote it but without secrets."""
        return shown(self.urls[self.locate(v)[0]])

    def index(self, shard: int) -> ShardIndex:
        """Returns the index of a shard."""
        return self._shard(shard).index

    def keys(self, shard: int) -> list[str]:
        """Returns the keys of a shard's samples."""
        return self._shard(shard).keys

    def sizes(self, shard: int) -> Numbers:
        """Returns the bytes of the field of each sample of a shard, or of all its members, int64 [samples]."""
        index = self._shard(shard).index
        return index.sizes() if self.field is None else index.field(self.field)[1]

    def read(self, v: int) -> Content:
        """Reads the field of sample `v`, as stored. Raises DataError (shard, byte, key)."""
        if self.field is None:
            raise ValueError("no field was named")
        number, i = self.locate(v)
        return self._shard(number, i).member(i, self.field)

    def read_many(self, samples: Numbers, field: str) -> Iterator[Content]:
        """Yields one member of each of `samples`: several times as fast as one by one. Raises what `read` raises."""
        numbers = np.searchsorted(self.starts, samples, side="right") - 1
        places = samples - self.starts[numbers]
        offsets, sizes = np.empty((2, len(samples)), np.int64)
        reads: dict[int, Callable[[int, int], Content]] = {}
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            shard = self._shard(number, int(places[chosen].max()))
            offsets[chosen], sizes[chosen] = (part[places[chosen]] for part in shard.field(field))
            reads[number] = shard.blob.read if offsets[chosen].min() >= 0 else _refuse
        spans = (part.tolist() for part in (numbers, places, offsets, sizes))
        for number, place, at, size in zip(*spans, strict=True):
            try:
                yield reads[number](at, size)
            except DataError:
                yield self._shard(number).member(place, field)  # raises it with the sample's name

    def members(self, v: int, names: Iterable[str] | None = None) -> dict[str, Content]:
        """Reads the members of sample `v` by extension, as stored; `names`: only these. Raises what `read` raises."""
        number, i = self.locate(v)
        return self.sample(number, i, None if names is None else frozenset(names))[1]

    def sample(self, number: int, i: int, names: frozenset[str] | None = None) -> tuple[str, dict[str, Content]]:
        """Reads key and members of sample `i` of a shard. Raises what `read` raises."""
        shard = self._shard(number, i)
        kinds, offsets, sizes, read = shard.names, shard.offsets, shard.sizes, shard.read
        rows: Sequence[int] = range(shard.starts[i], shard.starts[i + 1])
        if names is not None:
            rows = [row for row in rows if kinds[row] in names]
        return shard.keys[i], {kinds[row]: read(i, offsets[row], sizes[row]) for row in rows}

    def foresee(self, samples: Numbers) -> None:
        """Hints that these samples will be read soon: remote ones are fetched in the background."""
        for number, i in self.locate_many(samples) if self.remote else ():
            shard = self._shard(number, i)
            for row in range(shard.starts[i], shard.starts[i + 1]):
                shard.blob.prefetch(shard.offsets[row], shard.sizes[row])

    def foresee_from(self, v: int) -> None:
        """Hints that sample `v` and those after it in its shard will be read soon."""
        for number, i in self.locate_many(np.array([v])) if self.remote else ():
            shard = self._shard(number, i)
            start = shard.offsets[shard.starts[i]]
            shard.blob.prefetch(start, shard.blob.size - start)

    def check_unchanged(self, shard: int) -> None:
        """Raises DataError if the shard was changed since it was indexed."""
        if self._storage.stamp(self.urls[shard]) != self._shard(shard).index.stamp:
            raise _changed_error(self.urls[shard])

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].blob.close()
            self._open_bytes = 0

    def _shard(self, number: int, i: int | None = None) -> _Shard:
        """Returns the open shard. Raises DataError if it has no sample `i`: it is damaged, or its index was wrong."""
        try:
            shard = self._open[number]
            self._open.move_to_end(number)
        except KeyError:
            shard = self._keep_open(number, self._load(number))
        if i is not None and i >= len(shard.keys):
            raise self._missing_samples_error(shard.index)
        return shard

    def _keep_open(self, number: int, loaded: _Shard) -> _Shard:
        with self._lock:
            if number not in self._open:
                self._open_bytes += loaded.nbytes
            shard = self._open.setdefault(number, loaded)  # the one of another thread, if that was faster
            room = open_room()
            while len(self._open) > 1 and (len(self._open) > room or self._open_bytes > OPEN_BYTES):
                _, oldest = self._open.popitem(last=False)
                self._open_bytes -= oldest.nbytes
                oldest.blob.close()
        return shard

    def _load(self, number: int) -> _Shard:
        url, expected = self.urls[number], self.summaries[number]
        index = ShardIndex.open(url, self._storage, tolerant=self._tolerant or not expected.digest)
        if self._stamps.setdefault(number, index.stamp) != index.stamp:
            raise _changed_error(url)
        if expected.digest:
            return _Shard(_match_summary(index, expected, self._storage), index.stamp, self._storage)
        if index.fault is None and len(index.keys) != expected.samples:  # counted by another tool's index
            raise self._missing_samples_error(index)
        return _Shard(index, index.stamp, self._storage)

    def _missing_samples_error(self, index: ShardIndex) -> DataError:
        """Returns the error for a shard with fewer samples than its catalog, or another tool's index, says."""
        if index.fault is not None:
            return index.fault.error()
        name, num_samples = shown(index.url), len(index.keys)
        remedy = "an index beside it (.idx, sizes.json, ...) tells another number: delete or renew that"
        return DataError(f"{name}: holds {num_samples} samples, but {remedy}", shard=name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open, self._open_bytes, self._lock = OrderedDict(), 0, threading.Lock()
        share_descriptors(self)


def _inspect_shard(
    shard: tuple[str, Summary | None], *, storage: Storage, field: str | None, tolerant: bool, counts: ExternalCounts
) -> dict[str, Any]:
    """Returns a report of a shard, JSON-able: its summary, its present stamp, whether it was damaged since `earlier`.

    Raises DataError; ConfigError if a sample lacks `field`.
    """
    url, earlier = shard
    walked_before = earlier is not None and earlier.digest
    if (
        field is None
        and not walked_before
        and (external_summary := _count_externally(url, storage, counts)) is not None
    ):
        return {"summary": asdict(external_summary), "stamp": external_summary.stamp, "damaged_since": False}
    summary, full_index = index.summary(url, storage), None
    if summary is None or (summary.fault is not None and not tolerant):
        full_index = ShardIndex.open(url, storage, tolerant=tolerant)
        summary = full_index.summary
    stamp, is_damaged_since = summary.stamp, False
    if earlier is not None and not earlier.digest:  # counted by another tool's index, which is missing or stale now
        if (earlier.size, earlier.samples) == (summary.size, summary.samples):
            summary = replace(earlier, stamp=stamp)
    elif earlier is not None and earlier.digest != summary.digest:
        with suppress(DataError):
            _match_summary(full_index or ShardIndex.open(url, storage, tolerant=True), earlier, storage)
            is_damaged_since = summary.fault is not None
            summary = replace(earlier, fault=summary.fault or earlier.fault)
    if field is not None and summary.fields.get(field, (0, 0))[0] < summary.samples:
        full_index = full_index or ShardIndex.open(url, storage, tolerant=tolerant)
        sample = int(np.flatnonzero(full_index.field(field)[0] < 0)[0])
        members = ", ".join(sorted(full_index.members(sample)))
        problem = f"sample {full_index.keys[sample]!r} has no {field!r}; it has: {members}"
        raise ConfigError(f"data.field: {shown(url)}: {problem}")
    return {"summary": asdict(summary), "stamp": stamp, "damaged_since": is_damaged_since}


def _match_summary(current: ShardIndex, expected: Summary, storage: Storage) -> ShardIndex:
    """Returns the index that fits the expected summary: the current one, or if the shard was damaged or repaired since,
    the one from before. Raises DataError if it is not the same shard, or cannot be known to be.
    """
    if current.summary.digest == expected.digest:
        return current
    if current.fault is not None and (former := ShardIndex.load_former(current.url, storage, expected)) is not None:
        return former
    is_repaired = expected.fault is not None and len(current.keys) > expected.samples
    if is_repaired and (truncated := current.truncate(expected.samples)).summary.digest == expected.digest:
        return truncated
    raise _changed_error(current.url) if current.fault is None else current.fault.error()


def _count_externally(url: str, storage: Storage, counts: ExternalCounts) -> Summary | None:
    """Returns a summary without a digest, from another tool's index of the shard; None if there is none."""
    with ExitStack() as stack:
        blob = storage.open(url)
        stack.callback(blob.close)
        if (count := counts.count(blob)) is None:
            return None
        return Summary(blob.size, blob.stamp, count.samples, {}, "")


def from_json(summary: dict[str, Any]) -> Summary:
    """Restores a summary that went through `asdict` and JSON. Raises TypeError, ValueError, KeyError if it is
    malformed."""
    fields = {name: (int(count), int(size)) for name, (count, size) in summary["fields"].items()}
    return Summary(**{**summary, "fields": fields, "fault": summary["fault"] and BadData(**summary["fault"])})


def _fields(summary: Summary, field: str | None) -> Iterator[tuple[str, int]]:
    """Returns (name, bytes) of the members that are read: the field, or all of them."""
    return ((name, size) for name, (_, size) in sorted(summary.fields.items()) if field in (None, name))


def _refuse(at: int, size: int) -> Content:
    raise DataError("some samples of the shard lack the member")


def _changed_error(url: str) -> DataError:
    return DataError(f"{shown(url)}: was changed after it had been indexed", shard=shown(url))
