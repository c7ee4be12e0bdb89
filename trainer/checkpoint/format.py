"""What a checkpoint is on disk: a folder `step-00000100/` of

- `rank-00000.safetensors`, ...: what each process wrote, in the safetensors format, one contiguous piece after another;
- `index.json`: of each tensor its type, its shape, and by its sharding in which files its pieces lie;
- `manifest.json`, which came last: what the run was, size and checksum of every file, and its own checksum.

Nothing in it is executed: JSON and numbers, of which none is believed before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from trainer.checkpoint.reader import (
    LARGEST_JSON,
    DamagedCheckpoint,
    Reader,
    open_file,
    read_exactly,
    read_small,
    wait_for_answer,
)
from trainer.checkpoint.shardings import (
    BoxSharding,
    Sharding,
    Table,
    shape_from,
    sharding_of,
    whole_number,
    whole_numbers,
)
from trainer.checkpoint.state import DTYPES, Box
from trainer.errors import TrainingError
from trainer.files import replace_file, sync, sync_folder

VERSION = 3
READABLE = (2, VERSION)
MANIFEST, INDEX = "manifest.json", "index.json"
LARGEST_TABLES = 1 << 24  # numbers, in all tables of an index: a few descriptions can stand for very many pieces
CHUNK = 8 << 20  # bytes that are written, hashed or read at a time


class ShardLocation(NamedTuple):
    """A piece of a tensor and the file it lies in; where in there the file's header says."""

    file: str
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint: of all that ranks of its sharding hold, this replica was saved. Its pieces cover it,
    each element once."""

    dtype: str
    shape: tuple[int, ...]
    sharding: Sharding
    replica: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def intersecting(self, box: Box) -> list[ShardLocation]:
        """Where elements of this block lie."""
        table = self.sharding.table(self.shape)
        return [self._place(table, row) for row in table.intersecting(box)]

    def written_by(self, rank: int) -> list[Box]:
        table = self.sharding.table(self.shape)
        return [table.box(row) for row in table.rows_of(rank, self.replica)]

    def _place(self, table: Table, row: int) -> ShardLocation:
        return ShardLocation(tensor_file(int(table.ranks[row, self.replica])), table.box(row))


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def tensor_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def rank_of(file: str) -> int:
    """Who wrote a file of tensors. ValueError for another file."""
    if not (match := re.fullmatch(r"rank-(\d{5,18})\.safetensors", file)):
        raise ValueError(f"no file of tensors: {file!r}")
    return int(match[1])


def key_of(name: str, shape: tuple[int, ...], box: Box) -> str:
    """The name of a piece in its file; of one that is not the whole tensor, with where it begins."""
    return name if box.size == shape else f"{name}@{','.join(map(str, box.offset))}"


def header(entries: Sequence[tuple[str, str, Box, int]], about: dict[str, str]) -> bytes:
    """The beginning of a safetensors file of these (key, type, block, first byte behind the header), in rising order of
    bytes."""
    told: dict[str, Any] = {"__metadata__": about}
    for key, dtype, box, at in entries:
        end = at + box.numel * DTYPES[dtype].itemsize
        told[key] = {"dtype": dtype, "shape": box.size, "data_offsets": [at, end]}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, parts: Sequence[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file durably; gives its size and checksum, which is taken on the way."""
    digest, size = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                chunk = memoryview(part)[start : start + CHUNK]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
            size += len(part)
        sync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, with its own checksum in it, and makes the folder durable."""
    write_file(folder / MANIFEST, [_written(manifest)])
    sync_folder(folder)


def amend_manifest(folder: Path, **more: Any) -> bool:
    """Replaces entries of a manifest that is there, as a whole and durably; returns whether that changed anything.
    Raises DamagedCheckpoint; Outage, at once; OSError; TrainingError if it is not for us."""
    manifest = read_manifest(folder, patience_s=0)
    if manifest == (amended := {**manifest, **more}):
        return False
    replace_file(folder / MANIFEST, _written(amended))
    return True


def read_manifest(folder: Path, patience_s: float | None = None) -> dict[str, Any]:
    """The manifest, checked against its own checksum. `patience_s`: how long storage that does not answer is waited
    for, if not as usual. Raises DamagedCheckpoint; Outage; OSError; TrainingError if it is not for us."""
    try:
        raw = read_small(folder / MANIFEST, patience_s)
        manifest = json.loads(raw)
        del manifest["sha256"]
    except FileNotFoundError:
        raise DamagedCheckpoint("no manifest.json") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise DamagedCheckpoint(f"manifest.json cannot be read: {error!r}") from None
    if raw != _written(manifest):
        raise DamagedCheckpoint("manifest.json does not match its own checksum")
    if manifest.get("version") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise TrainingError(f"{folder}: format version {manifest.get('version')}, this onecurve reads {known}")
    try:
        for name, stated in manifest["files"].items():
            if not re.fullmatch(r"[\w-][\w.-]*", name) or {"bytes": int, "xxh3": str} != {
                k: type(v) for k, v in stated.items()
            }:
                raise DamagedCheckpoint(f"manifest.json: no file of a checkpoint: {name!r}")
        if folder.name.startswith("step-") and folder_name(int(manifest["step"])) != folder.name:
            raise DamagedCheckpoint(f"it is of step {manifest['step']}")
        manifest["files"][INDEX]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"manifest.json: {error!r}") from None
    return manifest


def check_sizes(
    folder: Path, manifest: dict[str, Any], names: Sequence[str] | None = None, patience_s: float | None = None
) -> None:
    """Whether these files (else all) are there, of their size and a file. Raises DamagedCheckpoint; Outage; OSError."""
    for name in manifest["files"] if names is None else names:
        stated = manifest["files"][name]
        try:
            found = wait_for_answer(path := folder / name, path.lstat, patience_s)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{name} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise DamagedCheckpoint(f"{name} is not a file")
        if found.st_size != stated["bytes"]:
            raise DamagedCheckpoint(f"{name} has {found.st_size} bytes, not {stated['bytes']}")


def check_contents(folder: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Whether these files are what was written. Raises DamagedCheckpoint; Outage; OSError."""
    chunk = memoryview(bytearray(CHUNK))
    for name in names:
        digest = xxhash.xxh3_128()
        with open_file(folder / name) as file:
            while count := file.readinto(chunk):
                digest.update(chunk[:count])
        if digest.hexdigest() != manifest["files"][name]["xxh3"]:
            raise DamagedCheckpoint(f"{name} does not match its checksum")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises DamagedCheckpoint; OSError; TrainingError if it is not for us."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    check_contents(folder, manifest, list(manifest["files"]))
    check_headers(folder, read_index(folder, manifest), list(manifest["files"]))
    return manifest


def write_index(path: Path, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """As `write_file`. A sharding is told once for all its tensors."""
    number = {sharding: i for i, sharding in enumerate(dict.fromkeys(stored.sharding for stored in tensors.values()))}
    told = {
        name: [stored.dtype, stored.shape, number[stored.sharding], stored.replica] for name, stored in tensors.items()
    }
    text = json.dumps(
        {"shardings": [sharding.to_json() for sharding in number], "tensors": told}, separators=(",", ":")
    )
    return write_file(path, [text.encode()])


def read_index(folder: Path, manifest: dict[str, Any]) -> dict[str, StoredTensor]:
    """`parse_index` of what is there. Also raises OSError."""
    return parse_index(read_index_text(folder), manifest)


def read_index_text(folder: Path) -> str:
    """Raises DamagedCheckpoint; OSError."""
    try:
        return read_small(folder / INDEX).decode()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"no {INDEX}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{INDEX} cannot be read: {error!r}") from None


def parse_index(text: str, manifest: dict[str, Any]) -> dict[str, StoredTensor]:
    """Returns every tensor by name. Raises DamagedCheckpoint where the index does not describe tensors that fit into
    the manifest's files."""
    try:
        index = json.loads(text)
        if manifest["version"] == 2:
            found = _tensors_of_version_2(index)
        else:
            shardings = [sharding_of(told) for told in index["shardings"]]
            found = {
                name: StoredTensor(dtype, shape_from(shape), shardings[whole_number(sharding)], whole_number(replica))
                for name, (dtype, shape, sharding, replica) in index["tensors"].items()
            }
        _check_tensors(found, {name: stated["bytes"] for name, stated in manifest["files"].items()})
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise DamagedCheckpoint(f"{INDEX} cannot be read: {error!r}") from None
    return found


def _tensors_of_version_2(index: Any) -> dict[str, StoredTensor]:
    """Each piece with its place: the file's number, its first byte (which the file's header says, too), its block."""
    ranks = [rank_of(file) for file in index["files"]]
    found = {}
    for name, (dtype, shape, places) in index["tensors"].items():
        rows = [
            (ranks[whole_number(file)], Box(whole_numbers(offset), whole_numbers(size)))
            for file, _, offset, size in places
        ]
        found[name] = StoredTensor(dtype, shape_from(shape), BoxSharding(rows))
    return found


def table_numbers(tensors: dict[str, StoredTensor]) -> int:
    """How many numbers the tables of all tensors have at most, before one of them is made."""
    tables = {(stored.sharding, stored.shape) for stored in tensors.values()}
    return sum(sharding.cost(len(shape)) for sharding, shape in tables)


def _check_tensors(tensors: dict[str, StoredTensor], sizes: dict[str, int]) -> None:
    """Raises DamagedCheckpoint unless each tensor is made up by its pieces, and the files are large enough for all of
    them. A table is looked at once, however many tensors have it."""
    total, itemsizes = sum(sizes.values()), defaultdict[tuple[Sharding, tuple[int, ...], int], int](int)
    for name, stored in tensors.items():
        if stored.dtype not in DTYPES:
            raise DamagedCheckpoint(f"{INDEX}: '{name}': unknown type {stored.dtype!r}")
        if stored.numel * DTYPES[stored.dtype].itemsize > total:
            raise DamagedCheckpoint(f"{INDEX}: '{name}' is larger than all files")
        itemsizes[stored.sharding, stored.shape, stored.replica] += DTYPES[stored.dtype].itemsize
    if table_numbers(tensors) > LARGEST_TABLES:
        raise DamagedCheckpoint(f"{INDEX}: its shardings make more pieces than a checkpoint can have")
    files = np.array(sorted(rank_of(file) for file in sizes if file != INDEX), np.int64)
    needed = np.zeros(len(files))
    for (sharding, shape, replica), itemsize in itemsizes.items():
        table = sharding.table(shape)
        table.raise_unless_whole(shape)
        writers = table.ranks[:, replica]
        if not np.isin(writers, files).all():
            raise DamagedCheckpoint(f"{INDEX}: a piece lies in a file that is not there")
        np.add.at(needed, np.searchsorted(files, writers), table.numel * float(itemsize))
    for rank, size in zip(files.tolist(), needed.tolist(), strict=True):
        if size > sizes[tensor_file(rank)]:
            raise DamagedCheckpoint(f"{INDEX}: a piece lies beyond the end of {tensor_file(rank)}")


def check_headers(folder: Path, tensors: dict[str, StoredTensor], names: Sequence[str]) -> None:
    """Whether each of these files holds the pieces that the index says. Raises DamagedCheckpoint; OSError."""
    for name in names:
        if name == INDEX:
            continue
        with open_file(folder / name) as file:
            entries = read_header(file, name)
        for tensor, stored in tensors.items():
            for box in stored.written_by(rank_of(name)):
                entries.find(tensor, stored, box)


class Header:
    """Where the pieces in a file lie, as the file itself says. Nothing is believed before it is checked, and that when
    it is asked for."""

    def __init__(self, file: str, told: Any, start: int, size: int):
        self.file, self.entries, self.start, self.size = file, told, start, size

    def find(self, name: str, stored: StoredTensor, box: Box) -> int:
        """The first byte of a piece of a tensor. Raises DamagedCheckpoint."""
        key = key_of(name, stored.shape, box)
        try:
            entry = self.entries[key]
            begin, end = whole_numbers(entry["data_offsets"])
            if entry["dtype"] != stored.dtype or tuple(entry["shape"]) != box.size:
                raise ValueError("of another type or shape")
            if end - begin != box.numel * DTYPES[stored.dtype].itemsize or self.start + end > self.size:
                raise ValueError("it lies beyond the end")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{self.file}: not what {INDEX} says of '{key}': {error!r}") from None
        return self.start + begin


def read_header(file: Reader, name: str) -> Header:
    """Reads the header of an open file of tensors. Raises DamagedCheckpoint or OSError."""
    size = file.size
    try:
        length = int.from_bytes(read_exactly(file, 8), "little")
        if length > min(size, LARGEST_JSON):
            raise ValueError("it is absurdly large")
        return Header(name, json.loads(read_exactly(file, length)), 8 + length, size)
    except (ValueError, EOFError, RecursionError, MemoryError) as error:
        raise DamagedCheckpoint(f"{name}: its header cannot be read: {error!r}") from None


def _written(manifest: dict[str, Any]) -> bytes:
    """The bytes of the file: one text for one manifest."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()
