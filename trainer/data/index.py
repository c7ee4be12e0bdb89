"""Where every sample of a set of WebDataset shards lies, and how to read any of them at once.

Grouping is webdataset's: consecutive members with one key are a sample, extensions are in lower case.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from trainer.data.tar import walk
from trainer.errors import ConfigError, DataError
from trainer.files import replace_file

FORMAT = "onecurve-index-1"
SIDECAR = ".index.json"
OPEN_SHARDS = 128
INDEXING_THREADS = 8
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset.tariterators.base_plus_ext
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips

Span = tuple[int, int]  # first byte in the shard, length


def key_and_extension(name: str) -> tuple[str, str] | None:
    """Sample key and lower-cased extension of a member; None for members that belong to no sample."""
    match = None if _METADATA.match(name) else _KEY_AND_EXTENSION.match(name)
    return (match[1], match[2].lower()) if match else None


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in its order: `keys[i]` and `members[i]` (extension -> span of bytes)."""

    path: str
    size: int
    mtime_ns: int
    keys: list[str]
    members: list[dict[str, Span]]

    @classmethod
    def build(cls, path: str) -> ShardIndex:
        """Walks the shard. Raises `DataError`: damage, a key that comes back, a member that comes twice."""
        try:
            before = os.stat(path)
            samples = _group(path)
            after = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{path}: was written to while it was being indexed")
        return cls(path, before.st_size, before.st_mtime_ns, list(samples), list(samples.values()))

    @classmethod
    def open(cls, path: str, cache_dir: Path | None = None) -> ShardIndex:
        """The index kept beside the shard (or in `cache_dir`: read-only folders); made if absent or stale."""
        places = [Path(path + SIDECAR)]
        if cache_dir is not None:
            name = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
            places.append(cache_dir / (name + SIDECAR))
        for place in places:
            if (index := cls.load(place, path)) is not None:
                return index
        index = cls.build(path)
        for place in places:
            try:
                index.save(place)
                break
            except OSError:
                continue  # read-only or full: the next place, or do without
        return index

    @classmethod
    def load(cls, sidecar: Path, path: str) -> ShardIndex | None:
        """The stored index if it is whole and of the shard as it is now."""
        try:
            stored, shard = json.loads(sidecar.read_bytes()), os.stat(path)
            now = [FORMAT, shard.st_size, shard.st_mtime_ns]
            if [stored["format"], stored["size"], stored["mtime_ns"]] != now:
                return None
            keys = [str(key) for key in stored["keys"]]
            members = [{e: (int(at), int(size)) for e, (at, size) in m.items()} for m in stored["members"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        within = all(at >= 0 and 0 <= size <= shard.st_size - at for m in members for at, size in m.values())
        index = cls(path, shard.st_size, shard.st_mtime_ns, keys, members)
        return index if within and len(keys) == len(members) else None

    def save(self, sidecar: Path) -> None:
        """Writes the index file, whole or not at all, and the folder for it if need be."""
        content = {"format": FORMAT, "size": self.size, "mtime_ns": self.mtime_ns}
        content |= {"keys": self.keys, "members": self.members}
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        replace_file(sidecar, json.dumps(content, separators=(",", ":")).encode())


def _group(path: str) -> dict[str, dict[str, Span]]:
    """Samples of a shard by key, in order."""
    samples: dict[str, dict[str, Span]] = {}
    open_key: str | None = None
    for member in walk(path):
        if (named := key_and_extension(member.name)) is None:
            continue
        key, extension = named
        where = f"{path}: byte {member.offset}: key {key!r}"
        if key != open_key and key in samples:
            raise DataError(f"{where} comes back after another one; a sample's members must lie together")
        open_key, sample = key, samples.setdefault(key, {})
        if extension in sample:
            raise DataError(f"{where} has a second member {extension!r}")
        sample[extension] = (member.offset, member.size)
    return samples


def expand(spec: str | Sequence[str], key: str = "data.shards") -> list[str]:
    """The paths that `spec` means: plain ones, `{000000..000007}`, globs (sorted), `~`, or a list of these.

    Raises one `ConfigError` that names all patterns without a match, missing files and shards listed twice, each
    under `key`, which `spec` was given for.
    """
    paths: list[str] = []
    problems: list[str] = []
    for pattern in [spec] if isinstance(spec, str) else spec:
        try:
            found = [path for piece in _braces(pattern) for path in _files(piece, key, problems)]
        except ValueError:
            problems.append(f"{key}: unbalanced braces in {pattern!r}")
            continue
        paths += found
    seen: set[str] = set()
    for path in paths:
        if (real := os.path.abspath(path)) in seen:
            problems.append(f"{key}: {path} is listed twice")
        seen.add(real)
    if not paths and not problems:
        problems.append(f"{key}: names no shard")
    if problems:
        raise ConfigError(problems)
    return paths


def _braces(pattern: str) -> Iterator[str]:
    return iter([pattern]) if os.path.exists(pattern) else braceexpand(pattern)


def _files(pattern: str, key: str, problems: list[str]) -> list[str]:
    """The files that one brace-free pattern means; adds to `problems` if there are none."""
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        problems.append(f"{key}: {pattern} is a folder; name its shards: {pattern.rstrip('/')}/*.tar")
        return []
    if "://" in pattern or pattern.startswith("pipe:"):
        problems.append(f"{key}: only local files can be read, not {pattern}")
        return []
    found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True))) if glob.has_magic(path) else []
    if not found:
        missing = "no file matches" if glob.has_magic(path) else "missing file"
        problems.append(f"{key}: {missing} {pattern}")
    return found


class _Descriptor:
    """An open shard, closed when its last reader lets go of it: no thread reads from a recycled number."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Shards:
    """A whole dataset: samples 0..n-1 in listed order, one member (`field`) of each. Many threads may read.

    `n`: number of samples. `sizes`: int64 [n], bytes of the field. `fingerprint`: sha256 over shard names,
    keys and sizes: the same in any folder.
    """

    def __init__(self, paths: Sequence[str], field: str, cache_dir: Path | None = None, key: str = "data.shards"):
        """Indexes the shards. Raises `DataError` for a bad one, `ConfigError` if a sample lacks `field`.

        `cache_dir` takes the indexes of read-only folders. `key`: what the shards were given for, in messages.
        """
        with ThreadPoolExecutor(min(INDEXING_THREADS, max(1, len(paths)))) as pool:
            indexes = list(pool.map(lambda path: ShardIndex.open(path, cache_dir), paths))
        self.field = field.lower()
        self._check(indexes, key)
        spans = [index.members[i][self.field] for index in indexes for i in range(len(index.keys))]
        self.n = len(spans)
        self._offsets, self.sizes = np.array(spans, dtype=np.int64).T.copy()
        self._paths = [index.path for index in indexes]
        self._keys = [index.keys for index in indexes]
        self._stamps = [(index.size, index.mtime_ns) for index in indexes]
        self._starts = [0, *accumulate(len(keys) for keys in self._keys)]
        self.fingerprint = self._fingerprint()
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._members: OrderedDict[int, list[dict[str, Span]]] = OrderedDict()  # of the shards last asked for
        self._cache_dir = cache_dir

    @classmethod
    def open(
        cls, spec: str | Sequence[str], field: str, cache_dir: Path | None = None, key: str = "data.shards"
    ) -> Shards:
        """The shards that `spec` means; see `expand` and the constructor for the rest and what is raised."""
        return cls(expand(spec, key), field, cache_dir, key)

    def _check(self, indexes: Sequence[ShardIndex], given_for: str) -> None:
        problems = []
        for index in indexes:
            for key, members in zip(index.keys, index.members, strict=True):
                if self.field not in members:
                    lack = f"sample {key!r} has no {self.field!r}; it has: {', '.join(sorted(members))}"
                    problems.append(f"data.field: {index.path}: {lack}")
                    break
        if not any(index.keys for index in indexes):
            problems.append(f"{given_for}: no samples in {', '.join(index.path for index in indexes[:8])}")
        if problems:
            raise ConfigError(problems)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, keys in zip(self._paths, self._keys, strict=True):
            head = f"{os.path.basename(path)}\0{len(keys)}\0"
            digest.update((head + "".join(f"{key}\0" for key in keys)).encode("utf-8", "surrogateescape"))
        digest.update(self.sizes.astype("<i8").tobytes())
        return digest.hexdigest()

    def locate(self, v: int) -> tuple[int, int]:
        """Number of the shard that sample `v` lies in, and its number there."""
        if not 0 <= v < self.n:
            raise IndexError(f"sample {v} of {self.n}")
        shard = bisect_right(self._starts, v) - 1
        return shard, v - self._starts[shard]

    def name(self, v: int) -> tuple[str, str]:
        """File name of the shard and key of sample `v`."""
        shard, i = self.locate(v)
        return os.path.basename(self._paths[shard]), self._keys[shard][i]

    def read(self, v: int) -> bytes:
        """The field of sample `v`, as stored. Raises `DataError` (shard, byte, key) where that fails."""
        shard, i = self.locate(v)
        return self._bytes(shard, i, int(self._offsets[v]), int(self.sizes[v]))

    def members(self, v: int) -> dict[str, bytes]:
        """Every member of sample `v` by extension, as stored. Raises as `read` does."""
        shard, i = self.locate(v)
        with self._lock:
            index = self._members.get(shard)
        if index is None:
            opened = ShardIndex.open(self._paths[shard], self._cache_dir)
            self._check_unchanged(shard, opened.size, opened.mtime_ns)
            index = opened.members
            with self._lock:
                self._members[shard] = index
                while len(self._members) > OPEN_SHARDS:
                    self._members.popitem(last=False)
        return {extension: self._bytes(shard, i, at, size) for extension, (at, size) in index[i].items()}

    def _bytes(self, shard: int, i: int, at: int, size: int) -> bytes:
        """`size` bytes from byte `at` of a shard, which belong to its sample `i`."""
        end = at + size
        try:
            descriptor = self._descriptor(shard)
            pieces = []
            while at < end and (piece := os.pread(descriptor.number, end - at, at)):
                pieces.append(piece)
                at += len(piece)
            problem = None if at == end else f"the file ends here, {end - at} bytes are missing"
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            raise DataError(f"{self._paths[shard]}: byte {at}: sample {self._keys[shard][i]!r}: {problem}")
        return b"".join(pieces)

    def path(self, v: int) -> str:
        """The shard of sample `v`, as it was given."""
        return self._paths[self.locate(v)[0]]

    def _descriptor(self, shard: int) -> _Descriptor:
        with self._lock:
            if shard not in self._open:
                opened = _Descriptor(self._paths[shard])
                now = os.fstat(opened.number)
                self._check_unchanged(shard, now.st_size, now.st_mtime_ns)
                self._open[shard] = opened
                while len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return self._open[shard]

    def _check_unchanged(self, shard: int, size: int, mtime_ns: int) -> None:
        if (size, mtime_ns) != self._stamps[shard]:
            raise DataError(f"{self._paths[shard]}: was changed after it had been indexed")

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        with self._lock:
            self._open.clear()
