"""Assembles shards from pieces that were packed independently: the same bytes as if one writer had written all samples.

For each split a piece leaves a body (its samples as a tar stores them) and a table of where they lie in it. A shard is
cut out of the bodies as soon as the pieces before it exist. Every step can be repeated; finished ones are skipped.
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

PIECES, SHARDS, DONE, TEMPORARY = "pieces", "out", "done", "tmp"  # subfolders of the work folder
_DIGEST = ".sha256"
_COPY = 4 << 20
_CAUSES_KEPT = 5  # causes that a piece keeps, of the documents that it left out

Sample = tuple[str, str, Mapping[str, bytes], Mapping[str, int]]  # split, key, members, amounts to count


class PieceRange(NamedTuple):
    """A range of a piece: samples [first, end), bytes [begin, stop) of its body."""

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
    """The table of where the samples of a body lie; see `write.Body`."""

    keys: list[str]
    starts: Numbers
    ends: Numbers
    table: npt.NDArray[Any]
    extensions: list[str]


def prepare(work: Path) -> None:
    """Creates the folders and deletes unfinished files in them. Deletes everything if finished shards are missing: they
    were published, and the bodies that they were made of are used up."""
    names = [path.name.removesuffix(_DIGEST) for path in (work / DONE).glob(f"*{_DIGEST}")]
    if not all((work / SHARDS / f"{name}{kind}").exists() for name in names for kind in ("", SIDECAR)):
        discard(work)
    for name in (PIECES, SHARDS, DONE, TEMPORARY):
        (work / name).mkdir(parents=True, exist_ok=True)
        for path in (work / name).iterdir():
            if name == TEMPORARY or path.name.startswith("."):
                path.unlink()


def discard(work: Path) -> None:
    """Deletes a work folder, its tables first: if this is killed, no table is left whose bodies are missing."""
    for table in (work / PIECES).glob("*.npz"):
        table.unlink()
    shutil.rmtree(work)


class _ChecksummedFile:
    """A file that keeps a checksum of what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self.crc32 = file, 0

    def write(self, content: bytes, /) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        return self._file.write(content)


def write_piece(work: Path, number: int, samples: Iterable[Sample], skipped: Sequence[str] = ()) -> None:
    """Writes the bodies and the table of a piece unless they exist. `skipped`: the causes of documents left out,
    complete once `samples` is exhausted."""
    if _is_whole(work, number):
        return
    bodies: dict[str, tuple[Path, _ChecksummedFile, Body]] = {}
    counts: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        for split, key, members, amounts in samples:
            if split not in bodies:
                path = work / TEMPORARY / uuid.uuid4().hex
                file = _ChecksummedFile(stack.enter_context(open(path, "xb", buffering=1 << 20)))
                bodies[split] = path, file, Body(file)
                counts[split] = {"samples": 0}
            try:
                bodies[split][2].add(key, members)
            except DataError as error:
                raise ConfigError(str(error)) from error
            for name, amount in {"samples": 1, **amounts}.items():
                counts[split][name] = counts[split].get(name, 0) + amount
    left_out = json.dumps([len(skipped), list(skipped[:_CAUSES_KEPT])]).encode()
    arrays: dict[str, Any] = {"skipped": np.frombuffer(left_out, np.uint8)}
    summaries: dict[str, Any] = {}
    for split, (path, file, body) in bodies.items():
        names = json.dumps({"keys": body.keys, "extensions": [*body.extensions]}).encode()
        arrays |= {f"{split}.starts": np.array(body.starts, np.int64), f"{split}.ends": np.array(body.ends, np.int64)}
        arrays |= {f"{split}.table": np.array(body.table, MEMBER), f"{split}.names": np.frombuffer(names, np.uint8)}
        summaries[split] = {"size": body.size, "crc32": file.crc32, "counts": counts[split]}
        move(path, _body(work, number, split))
    content = io.BytesIO()
    np.savez(content, about=np.frombuffer(json.dumps(summaries).encode(), np.uint8), **arrays)
    replace_file(_table(work, number), content.getvalue())  # last: it says that the bodies exist


def _body(work: Path, number: int, split: str) -> Path:
    return work / PIECES / f"{number:07d}.{split}"


def _table(work: Path, number: int) -> Path:
    return work / PIECES / f"{number:07d}.npz"


def _is_whole(work: Path, number: int) -> bool:
    """Returns whether the table exists and each body is whole (bodies are not synced to the disk) or used up."""
    try:
        summaries = counted(work, number)[0]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
    for split, summary in summaries.items():
        with suppress(FileNotFoundError), open(_body(work, number, split), "rb") as file:
            checksum = size = 0
            while part := file.read(_COPY):
                checksum, size = zlib.crc32(part, checksum), size + len(part)
            if (checksum, size) != (summary["crc32"], summary["size"]):
                return False
    return True


def counted(work: Path, number: int) -> tuple[dict[str, Any], dict[str, Numbers]]:
    """Returns the summary (size, crc32, counts) of each split of a piece, and the `ends` of its samples."""
    with np.load(_table(work, number), allow_pickle=False) as arrays:
        summaries = json.loads(arrays["about"].tobytes())
        return summaries, {split: arrays[f"{split}.ends"] for split in summaries}


def skipped(work: Path, number: int) -> tuple[int, list[str]]:
    """Returns how many documents of a piece were left out, and the causes of the first of them."""
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
    """Decides which samples go into which shard: a shard ends with the sample that brings it to `shard_bytes`."""

    split: str
    shard_bytes: int
    number: int = 0
    _spans: list[PieceRange] = field(default_factory=list)
    _size: int = 0

    def add(self, piece: int, ends: Numbers) -> Iterator[tuple[PieceRange, Shard | None]]:
        """Adds the next piece, whose samples end at `ends`. Yields its spans, each with the shard that it completes."""
        first = begin = 0
        while first < len(ends):
            full = int(np.searchsorted(ends, begin + self.shard_bytes - self._size)) + 1
            end = min(full, len(ends))
            span = PieceRange(piece, first, end, begin, int(ends[end - 1]))
            self._spans.append(span)
            self._size += span.stop - span.begin
            first, begin = end, span.stop
            yield span, self.close_shard() if self._size >= self.shard_bytes else None

    def close_shard(self) -> Shard | None:
        """Ends the current shard and returns it; None if it is empty."""
        if not self._spans:
            return None
        shard = Shard(self.split, self.number, tuple(self._spans))
        self.number, self._spans, self._size = self.number + 1, [], 0
        return shard


def write_shard(work: Path, shard: Shard) -> tuple[str, str]:
    """Writes a shard and its index unless they exist. Returns the file name and the sha256 of the shard."""
    name = shard_name(shard.split, shard.number)
    path, digest_path = work / SHARDS / name, work / DONE / f"{name}{_DIGEST}"
    with suppress(FileNotFoundError):
        return name, digest_path.read_text()
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
    replace_file(digest_path, digest.hexdigest().encode())  # last: it says that the shard exists
    return name, digest.hexdigest()


def drop_body(work: Path, number: int, split: str) -> None:
    """Deletes a body that no shard needs any more."""
    _body(work, number, split).unlink(missing_ok=True)


def _contents(work: Path, shard: Shard) -> Iterator[bytes]:
    for span in shard.spans:
        with open(_body(work, span.piece, shard.split), "rb", buffering=0) as file:
            file.seek(span.begin)
            remaining = span.stop - span.begin
            while remaining:
                part = file.read(min(remaining, _COPY))
                if not part:
                    raise OSError(f"{file.name} is shorter than it was")
                remaining -= len(part)
                yield part


def _index(work: Path, shard: Shard, path: Path) -> ShardIndex:
    """Returns the index of a shard, made from the tables of its pieces."""
    keys: list[str] = []
    starts: list[Numbers] = [np.zeros(1, np.int64)]
    tables, extensions = [], dict[str, int]()
    at = rows = 0
    for span in shard.spans:
        piece = _read_table(work, span.piece, shard.split)
        low, high = int(piece.starts[span.first]), int(piece.starts[span.end])
        table = piece.table[low:high].copy()
        table["offset"] += at - span.begin
        kinds, first_rows = np.unique(table["extension"], return_index=True)
        numbers = np.zeros(len(piece.extensions), np.int32)
        for kind in kinds[np.argsort(first_rows)].tolist():  # numbered as a walk meets them
            numbers[kind] = extensions.setdefault(piece.extensions[kind], len(extensions))
        table["extension"] = numbers[table["extension"]]
        tables.append(table)
        keys += piece.keys[span.first : span.end]
        starts.append(piece.starts[span.first + 1 : span.end + 1] - low + rows)
        at, rows = at + span.stop - span.begin, rows + high - low
    if len(set(keys)) < len(keys):
        duplicate = Counter(keys).most_common(1)[0][0]
        raise ConfigError(f"key {duplicate!r} comes twice: rename one of the inputs that it is made of")
    place, size = str(path), path.stat().st_size
    row_starts, members = np.concatenate(starts), np.concatenate(tables)
    return ShardIndex(place, size, stamp(place, place), keys, row_starts, members, [*extensions])
