"""Other people's indexes of shards: how many samples a shard has, told without reading it.

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
    """The file that says so."""


class Listing(NamedTuple):
    """What a file says of all the shards of a folder: base name -> (samples, bytes or None)."""

    place: str
    mtime_ns: int | None
    shards: dict[str, tuple[int, int | None]]


class ExternalCounts:
    """Asks the indexes beside shards. The files of a folder are read once. Any thread may ask."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._listings: dict[str, list[Listing]] = {}
        self._lock = threading.Lock()

    def count(self, blob: Blob) -> SampleCount | None:
        """How many samples of the shard some index tells of; None if there is none that can be of it."""
        if blob.url.startswith("pipe:"):
            return None
        local = None if is_remote(blob.url) else Path(local_path(blob.url))
        written = None
        if local is not None:
            with suppress(OSError):
                written = stat_file(local).st_mtime_ns
            if (found := _energon(local, blob.size, written)) is not None:
                return found
        folder, name = split(blob.url)
        for listing in self.listings(folder):
            samples, size = listing.shards.get(name, (None, None))
            older = written is not None and listing.mtime_ns is not None and listing.mtime_ns < written
            if samples is not None and not older and size in (None, blob.size):
                return SampleCount(samples, listing.place)
        return None

    def listings(self, folder: str) -> list[Listing]:
        """What the files that speak of all shards of a folder say, in the order in which they are believed."""
        with self._lock:  # held while reading: the other shards of the folder wait for the same files
            if folder not in self._listings:
                readers = ((ENERGON_INFO, _info), (WIDS, _wids), (SIZES, _sizes))
                found = (self._read(posixpath.join(folder, name), parse) for name, parse in readers)
                self._listings[folder] = [listing for listing in found if listing is not None]
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
    """Folder and base name of a shard's path or URL, without its query."""
    return posixpath.split(url.partition("?")[0] if is_url(url) else url)


def energon_offsets(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each sample of a shard begins, and where the last one ends: int64 [n + 1]. OSError, ValueError."""
    return np.frombuffer(read_file(path), "<u8").astype(np.int64)


def _energon(shard: Path, size: int, written: int | None) -> SampleCount | None:
    place = Path(f"{shard}{ENERGON}")
    with suppress(OSError, ValueError):
        about = stat_file(place)
        if written is None or about.st_mtime_ns < written:
            return None
        offsets = energon_offsets(place)
        if len(offsets) and offsets[0] >= 0 and np.all(np.diff(offsets) > 0) and offsets[-1] <= size:
            return SampleCount(len(offsets) - 1, os.fspath(place))
    return None


def _info(content: Any) -> dict[str, tuple[int, int | None]]:
    return _sizes(content["shard_counts"])


def _wids(content: Any) -> dict[str, tuple[int, int | None]]:
    if content["wids_version"] != 1:
        raise ValueError("another version")
    shards = [(shard["url"], (_samples(shard["nsamples"]), shard.get("filesize"))) for shard in content["shardlist"]]
    return _by_name([(split(url)[1], told) for url, told in shards])


def _sizes(content: Any) -> dict[str, tuple[int, int | None]]:
    """Names are relative to the folder: those with one of their own are not of its shards."""
    names = [(posixpath.normpath(name), (_samples(count), None)) for name, count in content.items()]
    return _by_name([(name, told) for name, told in names if "/" not in name])


def _by_name(told: list[tuple[str, tuple[int, int | None]]]) -> dict[str, tuple[int, int | None]]:
    """Without those whose name comes twice: which of them is meant cannot be known."""
    times = Counter(name for name, _ in told)
    return {name: of for name, of in told if times[name] == 1}


def _samples(count: Any) -> int:
    if int(count) < 0:
        raise ValueError("a negative number of samples")
    return int(count)
