"""A whole data set: the samples of all its shards in a row, any of them read at once.

Only a summary of every shard is held. Where the samples of a shard lie is looked up when one of them is asked for, so
a rank pays for the shards that it reads.
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

OPEN_BYTES = 1 << 30  # of indexes that are kept open

Content = bytes | memoryview


class _Shard:
    """One shard, opened: its index as plain arrays, and its bytes."""

    def __init__(self, index: ShardIndex, stamp: str, storage: Storage):
        self.index, self.keys, self.blob = index, index.keys, storage.open(index.url)
        if self.blob.stamp != stamp:
            raise _changed(index.url)
        # Views of arrays: an item of one is an int, four times as fast as numpy's.
        self.starts = index.starts.data
        self.offsets = np.ascontiguousarray(index.table["offset"]).data
        self.sizes = np.ascontiguousarray(index.table["size"]).data
        self.names = np.array(index.extensions, object)[index.table["extension"]].tolist()
        self.nbytes = 2 * index.nbytes
        self._fields: dict[str, tuple[Numbers, Numbers]] = {}

    def field(self, name: str) -> tuple[Numbers, Numbers]:
        """Offsets and sizes of a member of every sample, -1 where a sample lacks it."""
        if name not in self._fields:
            self._fields[name] = self.index.field(name)
        return self._fields[name]

    def read(self, i: int, at: int, size: int) -> Content:
        """`size` bytes from byte `at`, of sample `i`. DataError names the sample."""
        try:
            return self.blob.read(at, size)
        except DataError as error:
            place, key = shown(self.index.url), self.keys[i]
            cause = str(error).removeprefix(f"{place}: ")
            raise DataError(f"{place}: sample {key!r}: {cause}", shard=place, key=key, byte=error.byte) from error

    def member(self, i: int, name: str) -> Content:
        """One member of sample `i`. DataError names the sample."""
        offsets, sizes = self.field(name)
        if (at := int(offsets[i])) < 0:
            place, there = shown(self.index.url), ", ".join(sorted(self.index.members(i)))
            raise DataError(
                f"{place}: sample {self.keys[i]!r} has no {name!r}; it has: {there}", shard=place, key=self.keys[i]
            )
        return self.read(i, at, int(sizes[i]))


class Shards:
    """Samples 0..n-1 in listed order. Any thread may read; a copy sent to another process reads there.

    `n`: samples. `bytes`: of the member `field` in all of them, or of all members. `starts`: int64 [shards + 1], the
    first sample of each shard. `urls`: as given. `remote`: whether any comes over the network. `fingerprint`: of names,
    counts, keys and sizes, the same wherever the shards lie. `faults`: damaged shards. `summaries`: of each shard what
    a later life of a run is to find again. `damaged_since`: numbers of the shards that such a life found damaged, and
    takes as they were.
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
        self._seen: dict[int, str] = {}  # the stamp of each shard that this process has opened
        self._open: OrderedDict[int, _Shard] = OrderedDict()  # the last used last
        self._held = 0  # bytes of their indexes
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
        before: Sequence[tuple[str, Summary]] = (),
        team: WorkSharing = ALONE,
        patient: bool = False,
    ) -> Shards:
        """The shards that `spec` means (see `expand`) to the first rank of `team`, indexed where they are not yet: each
        rank its part.

        `field`: a member that all samples must have. None: none, and the indexes of others are believed, so that a
        shard is not walked before it is read. `tolerant`: of a damaged shard what lies before the damage is used.
        `before`: file names and summaries of the shards in an earlier life of the run; if they are these shards, what
        was damaged, repaired or counted by another since is taken as it was then. `patient`: a server that does not
        answer is waited for; else what is wrong now is told now.
        Raises ConfigError on all ranks, with all that is wrong; its exit code is DataError's if damage is all.
        """
        urls: list[str] = team.run_on_first(lambda: expand(spec, key, allow_pipe=storage.allow_pipe))
        field, hasty = field and field.lower(), replace(storage, patience_s=storage.patience_s * patient)
        look = partial(_look, storage=hasty, field=field, tolerant=tolerant, counts=ExternalCounts(hasty))
        same = [name for name, _ in before] == list(map(file_name, urls))
        known: Sequence[Summary | None] = [summary for _, summary in before] if same else [None] * len(urls)
        found = team.share("indexes of shards", list(zip(urls, known, strict=True)), look)
        summaries = [from_json(one["summary"]) for one in found]
        since = [number for number, one in enumerate(found) if one["damaged_since"]]
        shards = cls(urls, summaries, field, storage, tolerant=tolerant, damaged_since=since)
        shards._seen.update((number, found[number]["stamp"]) for number in range(team.rank, len(urls), team.size))
        if not shards.n:
            raise ConfigError(f"{key}: no samples in {', '.join(map(shown, urls[:8]))}")
        return shards

    def _fingerprint(self, summaries: Sequence[Summary]) -> str:
        digest = hashlib.sha256()
        for url, summary in zip(self.urls, summaries, strict=True):
            what = [summary.samples, summary.digest or summary.size, list(_fields(summary, self.field))]
            digest.update(json.dumps([file_name(url), *what]).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def locate(self, v: int) -> tuple[int, int]:
        """Number of the shard that sample `v` lies in, and its number there."""
        if not 0 <= v < self.n:
            raise IndexError(f"sample {v} of {self.n}")
        shard = bisect_right(self._first, v) - 1
        return shard, v - self._first[shard]

    def locate_many(self, samples: Numbers) -> Iterator[tuple[int, int]]:
        """`locate` of each."""
        numbers = np.searchsorted(self.starts, samples, side="right") - 1
        return zip(numbers.tolist(), (samples - self.starts[numbers]).tolist(), strict=True)

    def name(self, v: int) -> tuple[str, str]:
        """File name of the shard and key of sample `v`."""
        shard, i = self.locate(v)
        return file_name(self.urls[shard]), self._shard(shard, i).keys[i]

    def path(self, v: int) -> str:
        """The shard of sample `v`, as it was given but without secrets."""
        return shown(self.urls[self.locate(v)[0]])

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard."""
        return self._shard(shard).index

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples."""
        return self._shard(shard).keys

    def sizes(self, shard: int) -> Numbers:
        """Bytes of the field of each sample of a shard, or of all its members, int64 [samples]."""
        found = self._shard(shard).index
        return found.sizes() if self.field is None else found.field(self.field)[1]

    def read(self, v: int) -> Content:
        """The field of sample `v`, as stored. Raises DataError (shard, byte, key) where that fails."""
        if self.field is None:
            raise ValueError("no field was named")
        number, i = self.locate(v)
        return self._shard(number, i).member(i, self.field)

    def read_many(self, samples: Numbers, field: str) -> Iterator[Content]:
        """One member of each of `samples`, located together: several times as fast as one by one. Raises as `read`."""
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
        """The members of sample `v` by extension, as stored; `names`: only these. Raises as `read` does."""
        number, i = self.locate(v)
        return self.sample(number, i, None if names is None else frozenset(names))[1]

    def sample(self, number: int, i: int, names: frozenset[str] | None = None) -> tuple[str, dict[str, Content]]:
        """Key and members of sample `i` of a shard. Raises as `read` does."""
        shard = self._shard(number, i)
        kinds, offsets, sizes, read = shard.names, shard.offsets, shard.sizes, shard.read
        rows: Sequence[int] = range(shard.starts[i], shard.starts[i + 1])
        if names is not None:
            rows = [row for row in rows if kinds[row] in names]
        return shard.keys[i], {kinds[row]: read(i, offsets[row], sizes[row]) for row in rows}

    def foresee(self, samples: Numbers) -> None:
        """A hint that these samples will be read soon: what must come over the network is fetched meanwhile."""
        for number, i in self.locate_many(samples) if self.remote else ():
            shard = self._shard(number, i)
            for row in range(shard.starts[i], shard.starts[i + 1]):
                shard.blob.prefetch(shard.offsets[row], shard.sizes[row])

    def foresee_from(self, v: int) -> None:
        """A hint that sample `v` and those behind it in its shard will be read soon."""
        for number, i in self.locate_many(np.array([v])) if self.remote else ():
            shard = self._shard(number, i)
            start = shard.offsets[shard.starts[i]]
            shard.blob.prefetch(start, shard.blob.size - start)

    def check_unchanged(self, shard: int) -> None:
        """Raises DataError if the shard was changed since it was indexed."""
        if self._storage.stamp(self.urls[shard]) != self._shard(shard).index.stamp:
            raise _changed(self.urls[shard])

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].blob.close()
            self._held = 0

    def _shard(self, number: int, i: int | None = None) -> _Shard:
        """The shard, open. Raises DataError if it has no sample `i`: it is damaged, or its index lied."""
        try:
            shard = self._open[number]
            self._open.move_to_end(number)
        except KeyError:
            shard = self._put(number, self._load(number))
        if i is not None and i >= len(shard.keys):
            raise self._short(shard.index)
        return shard

    def _put(self, number: int, loaded: _Shard) -> _Shard:
        with self._lock:
            if number not in self._open:
                self._held += loaded.nbytes
            shard = self._open.setdefault(number, loaded)  # another thread's, where that was faster
            room = open_room()
            while len(self._open) > 1 and (len(self._open) > room or self._held > OPEN_BYTES):
                _, oldest = self._open.popitem(last=False)
                self._held -= oldest.nbytes
                oldest.blob.close()
        return shard

    def _load(self, number: int) -> _Shard:
        url, told = self.urls[number], self.summaries[number]
        found = ShardIndex.open(url, self._storage, tolerant=self._tolerant or not told.digest)
        if self._seen.setdefault(number, found.stamp) != found.stamp:
            raise _changed(url)
        if told.digest:
            return _Shard(_as_told(found, told, self._storage), found.stamp, self._storage)
        if found.fault is None and len(found.keys) != told.samples:  # another's index told of it
            raise self._short(found)
        return _Shard(found, found.stamp, self._storage)

    def _short(self, found: ShardIndex) -> DataError:
        """What is said of a shard that has not as many samples as its catalog, or another's index, promised."""
        if found.fault is not None:
            return found.fault.error()
        name, here = shown(found.url), len(found.keys)
        told = "an index beside it (.idx, sizes.json, ...) tells another number: delete or renew that"
        return DataError(f"{name}: holds {here} samples, but {told}", shard=name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open, self._held, self._lock = OrderedDict(), 0, threading.Lock()
        share_descriptors(self)


def _look(
    asked: tuple[str, Summary | None], *, storage: Storage, field: str | None, tolerant: bool, counts: ExternalCounts
) -> dict[str, Any]:
    """What is to be told of a shard, JSON-able: its summary, its stamp now, whether it was damaged since `before`.

    Raises DataError; ConfigError if a sample lacks `field`.
    """
    url, before = asked
    walked_before = before is not None and before.digest
    if field is None and not walked_before and (counted := _counted(url, storage, counts)) is not None:
        return {"summary": asdict(counted), "stamp": counted.stamp, "damaged_since": False}
    found, whole = index.summary(url, storage), None
    if found is None or (found.fault is not None and not tolerant):
        whole = ShardIndex.open(url, storage, tolerant=tolerant)
        found = whole.summary
    stamp, since = found.stamp, False
    if before is not None and not before.digest:  # another's index told of it, and is gone or too old by now
        if (before.size, before.samples) == (found.size, found.samples):
            found = replace(before, stamp=stamp)
    elif before is not None and before.digest != found.digest:
        with suppress(DataError):
            _as_told(whole or ShardIndex.open(url, storage, tolerant=True), before, storage)
            since = found.fault is not None
            found = replace(before, fault=found.fault or before.fault)
    if field is not None and found.fields.get(field, (0, 0))[0] < found.samples:
        whole = whole or ShardIndex.open(url, storage, tolerant=tolerant)
        lacking = int(np.flatnonzero(whole.field(field)[0] < 0)[0])
        there = f"sample {whole.keys[lacking]!r} has no {field!r}; it has: {', '.join(sorted(whole.members(lacking)))}"
        raise ConfigError(f"data.field: {shown(url)}: {there}")
    return {"summary": asdict(found), "stamp": stamp, "damaged_since": since}


def _as_told(found: ShardIndex, told: Summary, storage: Storage) -> ShardIndex:
    """The index of a shard as it was told of: itself, or if it was damaged since, or repaired, as it was before.

    Raises DataError if it is not the same shard, or cannot be known to be.
    """
    if found.summary.digest == told.digest:
        return found
    if found.fault is not None and (before := ShardIndex.of_before(found.url, storage, told)) is not None:
        return before
    repaired = told.fault is not None and len(found.keys) > told.samples
    if repaired and (cut := found.cut(told.samples)).summary.digest == told.digest:
        return cut
    raise _changed(found.url) if found.fault is None else found.fault.error()


def _counted(url: str, storage: Storage, counts: ExternalCounts) -> Summary | None:
    """A summary without a digest, by another one's index of the shard."""
    with ExitStack() as stack:
        blob = storage.open(url)
        stack.callback(blob.close)
        if (count := counts.count(blob)) is None:
            return None
        return Summary(blob.size, blob.stamp, count.samples, {}, "")


def from_json(summary: dict[str, Any]) -> Summary:
    """The summary of which `asdict` went through JSON. Raises TypeError, ValueError, KeyError if it is none."""
    fields = {name: (int(count), int(size)) for name, (count, size) in summary["fields"].items()}
    return Summary(**{**summary, "fields": fields, "fault": summary["fault"] and BadData(**summary["fault"])})


def _fields(summary: Summary, field: str | None) -> Iterator[tuple[str, int]]:
    """(name, bytes) of what is read of a shard's samples: the field, or all there are."""
    return ((name, size) for name, (_, size) in sorted(summary.fields.items()) if field in (None, name))


def _refuse(at: int, size: int) -> Content:
    raise DataError("some samples of the shard lack the member")


def _changed(url: str) -> DataError:
    return DataError(f"{shown(url)}: was changed after it had been indexed", shard=shown(url))
