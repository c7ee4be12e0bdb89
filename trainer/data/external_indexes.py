"""Indexes of shards in other tools' formats: they say how many samples a shard has, without reading it.

- Megatron-Energon: `X.tar.idx`, little-endian uint64: the byte at which each sample begins, then the one at which the
  last one ends; and `.nv-meta/.info.json`: {"shard_counts": {"X.tar": samples}}.
- wids (webdataset's `widsindex create`): `shardindex.json`: {"wids_version": 1, "shardlist": [{"url", "nsamples"}]}.
- `sizes.json`, which open_clip and others read: {"X.tar": samples}.

They are believed until a shard is walked, and ignored where they are older than it, do not fit it, name two shards of
its name (`0.tar`, `sub/0.tar`), or cannot be read.
"""

from __future__ import annotations

import json
import os
import posixpath
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.storage import Blob, Storage, is_remote, is_url, shown
from trainer.data.storage.urls import local_path
from trainer.errors import ConfigError, DataError
from trainer.files import read_file, stat_file

ENERGON = ".idx"
ENERGON_INFO = ".nv-meta/.info.json"
WIDS = "shardindex.json"
SIZES = "sizes.json"
_LARGEST = 1 << 30


class SampleCount(NamedTuple):
    samples: int
    source: str
    """The file that the count is from."""


class Listing(NamedTuple):
    """Holds what an index file says about all shards of a folder: base name -> (samples, bytes or None)."""

    place: str
    mtime_ns: int | None
    shards: dict[str, tuple[int, int | None]]


class ExternalCounts:
    """Reads sample counts from the indexes beside shards. Reads the files of a folder once. It is thread-safe."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._listings: dict[str, list[Listing]] = {}
        self._lock = threading.Lock()

    def count(self, blob: Blob) -> SampleCount | None:
        """Returns the number of samples according to an index of the shard; None if no index fits it."""
        if blob.url.startswith("pipe:"):
            return None
        local_file = None if is_remote(blob.url) else Path(local_path(blob.url))
        modified_ns = None
        if local_file is not None:
            with suppress(OSError):
                modified_ns = stat_file(local_file).st_mtime_ns
            if (energon_count := _energon(local_file, blob.size, modified_ns)) is not None:
                return energon_count
        folder, name = split(blob.url)
        for listing in self.listings(folder):
            samples, size = listing.shards.get(name, (None, None))
            is_stale = modified_ns is not None and listing.mtime_ns is not None and listing.mtime_ns < modified_ns
            if samples is not None and not is_stale and size in (None, blob.size):
                return SampleCount(samples, listing.place)
        return None

    def listings(self, folder: str) -> list[Listing]:
        """Returns what index files say about all shards of a folder, in the order in which they are believed."""
        with self._lock:  # held while reading: the other shards of the folder wait for the same files
            if folder not in self._listings:
                readers = ((ENERGON_INFO, _info), (WIDS, _wids), (SIZES, _sizes))
                results = (self._read(posixpath.join(folder, name), parse) for name, parse in readers)
                self._listings[folder] = [listing for listing in results if listing is not None]
            return self._listings[folder]

    def _read(self, place: str, parse: Callable[[Any], dict[str, tuple[int, int | None]]]) -> Listing | None:
        with suppress(OSError, ConfigError, DataError, ValueError, KeyError, TypeError, AttributeError):
            if is_remote(place):
                blob = self._storage.plain(place, keep=False)
                try:
                    content, mtime_ns = blob.read(0, min(blob.size, _LARGEST)), None
                finally:
                    blob.close()
            else:
                path = Path(local_path(place))
                mtime_ns, content = stat_file(path).st_mtime_ns, read_file(path)
            return Listing(shown(place), mtime_ns, parse(json.loads(bytes(content))))
        return None


def split(url: str) -> tuple[str, str]:
    """Splits a shard's path or URL, without its query, into folder and base name."""
    return posixpath.split(url.partition("?")[0] if is_url(url) else url)


def energon_offsets(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns where each sample of a shard begins, and where the last one ends: int64 [n + 1]. Raises OSError,
    ValueError."""
    return np.frombuffer(read_file(path), "<u8").astype(np.int64)


def _energon(shard: Path, size: int, modified_ns: int | None) -> SampleCount | None:
    sidecar = Path(f"{shard}{ENERGON}")
    with suppress(OSError, ValueError):
        status = stat_file(sidecar)
        if modified_ns is None or status.st_mtime_ns < modified_ns:
            return None
        offsets = energon_offsets(sidecar)
        if len(offsets) and offsets[0] >= 0 and np.all(np.diff(offsets) > 0) and offsets[-1] <= size:
            return SampleCount(len(offsets) - 1, os.fspath(sidecar))
    return None


def _info(content: Any) -> dict[str, tuple[int, int | None]]:
    return _sizes(content["shard_counts"])


def _wids(content: Any) -> dict[str, tuple[int, int | None]]:
    if content["wids_version"] != 1:
        raise ValueError("another version")
    shards = [(shard["url"], (_samples(shard["nsamples"]), shard.get("filesize"))) for shard in content["shardlist"]]
    return _by_name([(split(url)[1], counts) for url, counts in shards])


def _sizes(content: Any) -> dict[str, tuple[int, int | None]]:
    """Names are relative to the folder: a name with a folder of its own is not one of its shards."""
    shards = [(posixpath.normpath(name), (_samples(count), None)) for name, count in content.items()]
    return _by_name([(name, counts) for name, counts in shards if "/" not in name])


def _by_name(shards: list[tuple[str, tuple[int, int | None]]]) -> dict[str, tuple[int, int | None]]:
    """Leaves out names that occur twice: which shard is meant cannot be known."""
    occurrences = Counter(name for name, _ in shards)
    return {name: counts for name, counts in shards if occurrences[name] == 1}


def _samples(count: Any) -> int:
    if int(count) < 0:
        raise ValueError("a negative number of samples")
    return int(count)
