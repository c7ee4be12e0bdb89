"""Shards out of pieces that were made apart from each other: the same as if one writer had written all samples.

A piece leaves a body (what its samples are in a tar) for each split and a table of where they lie in it. As soon as
the pieces before it are there, a shard is cut out of the bodies. Steps can be repeated, and are not done twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.index import SIDECAR, Numbers, ShardIndex
from trainer.data.storage.local import stamp
from trainer.data.tools.write import MEMBER, Body, ending, shard_name
from trainer.errors import ConfigError, DataError
from trainer.files import move, replace_file, sync, sync_folder

PIECES, SHARDS, DONE, TEMPORARY = "pieces", "out", "done", "tmp"  # folders of the work folder
_DIGEST = ".sha256"
_COPY = 4 << 20
_TOLD = 5  # documents of a piece that were left out, whose causes are kept

Sample = tuple[str, str, Mapping[str, bytes], Mapping[str, int]]  # split, key, members, what is counted of them


class PieceRange(NamedTuple):
    """Samples [first, end) of a piece, bytes [begin, stop) of its body."""

    piece: int
    first: int
    end: int
    begin: int
    stop: int


class Shard(NamedTuple):
    split: str
    number: int
    spans: tuple[PieceRange, ...]


@dataclass(frozen=True)
class Table:
    """Where the samples of a body lie; see `write.Body`."""

    keys: list[str]
    starts: Numbers
    ends: Numbers
    table: npt.NDArray[Any]
    extensions: list[str]


def prepare(work: Path) -> None:
    """Makes the folders; what was not finished in them goes. All goes if shards are gone that were finished: they were
    published, and the bodies that they were made of are used up."""
    names = [path.name.removesuffix(_DIGEST) for path in (work / DONE).glob(f"*{_DIGEST}")]
    if not all((work / SHARDS / f"{name}{kind}").exists() for name in names for kind in ("", SIDECAR)):
        discard(work)
    for name in (PIECES, SHARDS, DONE, TEMPORARY):
        (work / name).mkdir(parents=True, exist_ok=True)
        for path in (work / name).iterdir():
            if name == TEMPORARY or path.name.startswith("."):
                path.unlink()


def discard(work: Path) -> None:
    """Deletes a work folder. The tables first: killed meanwhile, it holds none without the bodies that it tells of."""
    for table in (work / PIECES).glob("*.npz"):
        table.unlink()
    shutil.rmtree(work)


class _Checked:
    """A file that keeps a checksum of what is written."""

    def __init__(self, file: BinaryIO):
        self._file, self.crc32 = file, 0

    def write(self, content: bytes, /) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        return self._file.write(content)


def write_piece(work: Path, number: int, samples: Iterable[Sample], skipped: Sequence[str] = ()) -> None:
    """Makes the bodies and the table of a piece, unless they are there. `skipped`: what `samples` left out, and why, by
    the time that they are through."""
    if _is_whole(work, number):
        return
    bodies: dict[str, tuple[Path, _Checked, Body]] = {}
    counts: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        for split, key, members, amounts in samples:
            if split not in bodies:
                path = work / TEMPORARY / uuid.uuid4().hex
                file = _Checked(stack.enter_context(open(path, "xb", buffering=1 << 20)))
                bodies[split] = path, file, Body(file)
                counts[split] = {"samples": 0}
            try:
                bodies[split][2].add(key, members)
            except DataError as error:
                raise ConfigError(str(error)) from error
            for what, amount in {"samples": 1, **amounts}.items():
                counts[split][what] = counts[split].get(what, 0) + amount
    left_out = json.dumps([len(skipped), list(skipped[:_TOLD])]).encode()
    arrays: dict[str, Any] = {"skipped": np.frombuffer(left_out, np.uint8)}
    about: dict[str, Any] = {}
    for split, (path, file, body) in bodies.items():
        names = json.dumps({"keys": body.keys, "extensions": [*body.extensions]}).encode()
        arrays |= {f"{split}.starts": np.array(body.starts, np.int64), f"{split}.ends": np.array(body.ends, np.int64)}
        arrays |= {f"{split}.table": np.array(body.table, MEMBER), f"{split}.names": np.frombuffer(names, np.uint8)}
        about[split] = {"size": body.size, "crc32": file.crc32, "counts": counts[split]}
        move(path, _body(work, number, split))
    content = io.BytesIO()
    np.savez(content, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    replace_file(_table(work, number), content.getvalue())  # last: it says that the bodies are there


def _body(work: Path, number: int, split: str) -> Path:
    return work / PIECES / f"{number:07d}.{split}"


def _table(work: Path, number: int) -> Path:
    return work / PIECES / f"{number:07d}.npz"


def _is_whole(work: Path, number: int) -> bool:
    """Whether the table is there, and each body is whole (they are not forced to the disk) or was used up."""
    try:
        about = counted(work, number)[0]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
    for split, told in about.items():
        with suppress(FileNotFoundError), open(_body(work, number, split), "rb") as file:
            found = size = 0
            while part := file.read(_COPY):
                found, size = zlib.crc32(part, found), size + len(part)
            if (found, size) != (told["crc32"], told["size"]):
                return False
    return True


def counted(work: Path, number: int) -> tuple[dict[str, Any], dict[str, Numbers]]:
    """Returns what is known of each split of a piece, and the `ends` of its samples."""
    with np.load(_table(work, number), allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        return about, {split: arrays[f"{split}.ends"] for split in about}


def skipped(work: Path, number: int) -> tuple[int, list[str]]:
    """How many documents of a piece were left out, and why the first of them were."""
    with np.load(_table(work, number), allow_pickle=False) as arrays:
        count, causes = json.loads(arrays["skipped"].tobytes())
        return count, causes


def _read_table(work: Path, number: int, split: str) -> Table:
    with np.load(_table(work, number), allow_pickle=False) as arrays:
        names = json.loads(arrays[f"{split}.names"].tobytes())
        starts, ends, table = (arrays[f"{split}.{name}"] for name in ("starts", "ends", "table"))
    return Table(names["keys"], starts, ends, table, names["extensions"])


@dataclass
class Cutter:
    """Says which samples are in which shard: a shard ends with the sample that brings it to `shard_bytes`."""

    split: str
    shard_bytes: int
    number: int = 0
    _spans: list[PieceRange] = field(default_factory=list)
    _size: int = 0

    def add(self, piece: int, ends: Numbers) -> Iterator[tuple[PieceRange, Shard | None]]:
        """The next piece, whose samples end at these bytes: its spans, each with the shard that it completes."""
        first = begin = 0
        while first < len(ends):
            full = int(np.searchsorted(ends, begin + self.shard_bytes - self._size)) + 1
            end = min(full, len(ends))
            span = PieceRange(piece, first, end, begin, int(ends[end - 1]))
            self._spans.append(span)
            self._size += span.stop - span.begin
            first, begin = end, span.stop
            yield span, self.rest() if self._size >= self.shard_bytes else None

    def rest(self) -> Shard | None:
        """The shard of what there is so far; None if there is nothing."""
        if not self._spans:
            return None
        shard = Shard(self.split, self.number, tuple(self._spans))
        self.number, self._spans, self._size = self.number + 1, [], 0
        return shard


def write_shard(work: Path, shard: Shard) -> tuple[str, str]:
    """Makes a shard and its index, unless they are there. File name and sha256 of the shard."""
    name = shard_name(shard.split, shard.number)
    path, done = work / SHARDS / name, work / DONE / f"{name}{_DIGEST}"
    with suppress(FileNotFoundError):
        return name, done.read_text()
    temporary, digest, size = work / TEMPORARY / uuid.uuid4().hex, hashlib.sha256(), 0
    with open(temporary, "xb", buffering=0) as file:
        for part in _contents(work, shard):
            file.write(part)
            digest.update(part)
            size += len(part)
        file.write(end := ending(size))
        digest.update(end)
        sync(file.fileno())
    move(temporary, path)
    _index(work, shard, path).save(Path(f"{path}{SIDECAR}"))
    sync_folder(path.parent)
    replace_file(done, digest.hexdigest().encode())  # last: it says that the shard is there
    return name, digest.hexdigest()


def drop_body(work: Path, number: int, split: str) -> None:
    """A body that no shard needs any more."""
    _body(work, number, split).unlink(missing_ok=True)


def _contents(work: Path, shard: Shard) -> Iterator[bytes]:
    for span in shard.spans:
        with open(_body(work, span.piece, shard.split), "rb", buffering=0) as file:
            file.seek(span.begin)
            left = span.stop - span.begin
            while left:
                part = file.read(min(left, _COPY))
                if not part:
                    raise OSError(f"{file.name} is shorter than it was")
                left -= len(part)
                yield part


def _index(work: Path, shard: Shard, path: Path) -> ShardIndex:
    """The index of a shard, from the tables of its pieces."""
    keys: list[str] = []
    starts: list[Numbers] = [np.zeros(1, np.int64)]
    tables, extensions = [], dict[str, int]()
    at = rows = 0
    for span in shard.spans:
        piece = _read_table(work, span.piece, shard.split)
        low, high = int(piece.starts[span.first]), int(piece.starts[span.end])
        table = piece.table[low:high].copy()
        table["offset"] += at - span.begin
        kinds, seen = np.unique(table["extension"], return_index=True)
        numbers = np.zeros(len(piece.extensions), np.int32)
        for kind in kinds[np.argsort(seen)].tolist():  # numbered as a walk meets them
            numbers[kind] = extensions.setdefault(piece.extensions[kind], len(extensions))
        table["extension"] = numbers[table["extension"]]
        tables.append(table)
        keys += piece.keys[span.first : span.end]
        starts.append(piece.starts[span.first + 1 : span.end + 1] - low + rows)
        at, rows = at + span.stop - span.begin, rows + high - low
    if len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise ConfigError(f"key {twice!r} comes twice: rename one of the inputs that it is made of")
    place, size = str(path), path.stat().st_size
    rows_of, members = np.concatenate(starts), np.concatenate(tables)
    return ShardIndex(place, size, stamp(place, place), keys, rows_of, members, [*extensions])
