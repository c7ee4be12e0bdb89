"""What a checkpoint is on disk: a folder `step-00000100/` of

- `rank-00000.safetensors`, ...: what each process wrote, in the safetensors format, one contiguous shard after another;
- `index.json`: the type and the shape of each tensor, and its sharding, which tells in which files its shards lie;
- `manifest.json`, written last: what the run was, the size and the checksum of every file, and its own checksum.

Nothing in it is executed: it is JSON and numbers, and none of them is trusted before it is checked.
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
LARGEST_TABLES = 1 << 24  # numbers, in all tables of an index: a few descriptions can stand for very many shards
CHUNK = 8 << 20  # bytes that are written, hashed or read at a time


class ShardLocation(NamedTuple):
    """A shard of a tensor and the file that it lies in; the file's header tells where in the file."""

    file: str
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint. Of the replicas that the ranks of its sharding hold, `replica` was saved; its shards
    cover each element of the tensor once."""

    dtype: str
    shape: tuple[int, ...]
    sharding: Sharding
    replica: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def find_shards(self, box: Box) -> list[ShardLocation]:
        """Returns the shards that have elements of this block."""
        table = self.sharding.table(self.shape)
        return [self._locate(table, row) for row in table.rows_intersecting(box)]

    def boxes_written_by(self, rank: int) -> list[Box]:
        table = self.sharding.table(self.shape)
        return [table.box(row) for row in table.rows_of(rank, self.replica)]

    def _locate(self, table: Table, row: int) -> ShardLocation:
        return ShardLocation(tensor_file(int(table.ranks[row, self.replica])), table.box(row))


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def tensor_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def rank_of(file: str) -> int:
    """Returns the rank that wrote a file of tensors. Raises ValueError for any other file."""
    if not (match := re.fullmatch(r"rank-(\d{5,18})\.safetensors", file)):
        raise ValueError(f"no file of tensors: {file!r}")
    return int(match[1])


def key_of(name: str, shape: tuple[int, ...], box: Box) -> str:
    """Returns the key of a shard in its file: the tensor's name, with the shard's offset unless it is the whole
    tensor."""
    return name if box.size == shape else f"{name}@{','.join(map(str, box.offset))}"


def header(entries: Sequence[tuple[str, str, Box, int]], metadata: dict[str, str]) -> bytes:
    """Returns the header of a safetensors file of these `entries`: (key, type, block, first byte after the header), in
    ascending order of bytes."""
    table: dict[str, Any] = {"__metadata__": metadata}
    for key, dtype, box, begin in entries:
        end = begin + box.numel * DTYPES[dtype].itemsize
        table[key] = {"dtype": dtype, "shape": box.size, "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, parts: Sequence[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file durably. Returns its size and its checksum, which is computed as it is written."""
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
    write_file(folder / MANIFEST, [_to_bytes(manifest)])
    sync_folder(folder)


def amend_manifest(folder: Path, **entries: Any) -> bool:
    """Replaces entries of an existing manifest, atomically and durably. Returns whether that changed anything. Raises
    DamagedCheckpoint; Outage, at once; OSError; TrainingError for a format version that we do not read."""
    manifest = read_manifest(folder, patience_s=0)
    if manifest == (new_manifest := {**manifest, **entries}):
        return False
    replace_file(folder / MANIFEST, _to_bytes(new_manifest))
    return True


def read_manifest(folder: Path, patience_s: float | None = None) -> dict[str, Any]:
    """Returns the manifest, checked against its own checksum. `patience_s`: how long to wait for storage that does not
    answer; None: the default. Raises DamagedCheckpoint; Outage; OSError; TrainingError for a format version that we do
    not read."""
    try:
        raw = read_small(folder / MANIFEST, patience_s)
        manifest = json.loads(raw)
        del manifest["sha256"]
    except FileNotFoundError:
        raise DamagedCheckpoint("no manifest.json") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise DamagedCheckpoint(f"manifest.json cannot be read: {error!r}") from None
    if raw != _to_bytes(manifest):
        raise DamagedCheckpoint("manifest.json does not match its own checksum")
    if manifest.get("version") not in READABLE:
        versions = " and ".join(map(str, READABLE))
        raise TrainingError(f"{folder}: format version {manifest.get('version')}, this onecurve reads {versions}")
    try:
        for name, file in manifest["files"].items():
            if not re.fullmatch(r"[\w-][\w.-]*", name) or {"bytes": int, "xxh3": str} != {
                k: type(v) for k, v in file.items()
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
    """Raises DamagedCheckpoint unless these files (None: all) are there, are regular files and have the size that the
    manifest says. Also raises Outage; OSError."""
    for name in manifest["files"] if names is None else names:
        size = manifest["files"][name]["bytes"]
        try:
            status = wait_for_answer(path := folder / name, path.lstat, patience_s)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{name} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCheckpoint(f"{name} is not a file")
        if status.st_size != size:
            raise DamagedCheckpoint(f"{name} has {status.st_size} bytes, not {size}")


def check_contents(folder: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Raises DamagedCheckpoint unless these files match their checksums. Also raises Outage; OSError."""
    chunk = memoryview(bytearray(CHUNK))
    for name in names:
        digest = xxhash.xxh3_128()
        with open_file(folder / name) as file:
            while count := file.readinto(chunk):
                digest.update(chunk[:count])
        if digest.hexdigest() != manifest["files"][name]["xxh3"]:
            raise DamagedCheckpoint(f"{name} does not match its checksum")


def verify(folder: Path) -> dict[str, Any]:
    """Checks every byte of a checkpoint and returns its manifest. Raises DamagedCheckpoint; OSError; TrainingError for
    a format version that we do not read."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    check_contents(folder, manifest, list(manifest["files"]))
    check_headers(folder, read_index(folder, manifest), list(manifest["files"]))
    return manifest


def write_index(path: Path, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """Writes the index with each sharding once, and returns what `write_file` does."""
    numbers = {sharding: i for i, sharding in enumerate(dict.fromkeys(stored.sharding for stored in tensors.values()))}
    rows = {
        name: [stored.dtype, stored.shape, numbers[stored.sharding], stored.replica] for name, stored in tensors.items()
    }
    text = json.dumps(
        {"shardings": [sharding.to_json() for sharding in numbers], "tensors": rows}, separators=(",", ":")
    )
    return write_file(path, [text.encode()])


def read_index(folder: Path, manifest: dict[str, Any]) -> dict[str, StoredTensor]:
    """Reads and parses the index. Raises what `parse_index` does; OSError."""
    return parse_index(read_index_text(folder), manifest)


def read_index_text(folder: Path) -> str:
    """Returns the text of the index. Raises DamagedCheckpoint; OSError."""
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
            tensors = _parse_version_2(index)
        else:
            shardings = [sharding_of(description) for description in index["shardings"]]
            tensors = {
                name: StoredTensor(dtype, shape_from(shape), shardings[whole_number(sharding)], whole_number(replica))
                for name, (dtype, shape, sharding, replica) in index["tensors"].items()
            }
        _check_tensors(tensors, {name: file["bytes"] for name, file in manifest["files"].items()})
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise DamagedCheckpoint(f"{INDEX} cannot be read: {error!r}") from None
    return tensors


def _parse_version_2(index: Any) -> dict[str, StoredTensor]:
    """Parses an index that lists each shard: the file's number, its first byte (as the file's header says), its
    block."""
    ranks = [rank_of(file) for file in index["files"]]
    tensors = {}
    for name, (dtype, shape, places) in index["tensors"].items():
        rows = [
            (ranks[whole_number(file)], Box(whole_numbers(offset), whole_numbers(size)))
            for file, _, offset, size in places
        ]
        tensors[name] = StoredTensor(dtype, shape_from(shape), BoxSharding(rows))
    return tensors


def table_numbers(tensors: dict[str, StoredTensor]) -> int:
    """Returns an upper bound on how many numbers the tables of all tensors have, without making one of them."""
    tables = {(stored.sharding, stored.shape) for stored in tensors.values()}
    return sum(sharding.cost(len(shape)) for sharding, shape in tables)


def _check_tensors(tensors: dict[str, StoredTensor], sizes: dict[str, int]) -> None:
    """Raises DamagedCheckpoint unless the shards of each tensor make it up, and the files are large enough for all of
    them. A table is checked once, however many tensors share it."""
    total, itemsizes = sum(sizes.values()), defaultdict[tuple[Sharding, tuple[int, ...], int], int](int)
    for name, stored in tensors.items():
        if stored.dtype not in DTYPES:
            raise DamagedCheckpoint(f"{INDEX}: '{name}': unknown type {stored.dtype!r}")
        if stored.numel * DTYPES[stored.dtype].itemsize > total:
            raise DamagedCheckpoint(f"{INDEX}: '{name}' is larger than all files")
        itemsizes[stored.sharding, stored.shape, stored.replica] += DTYPES[stored.dtype].itemsize
    if table_numbers(tensors) > LARGEST_TABLES:
        raise DamagedCheckpoint(f"{INDEX}: its shardings make more shards than a checkpoint can have")
    files = np.array(sorted(rank_of(file) for file in sizes if file != INDEX), np.int64)
    needed = np.zeros(len(files))
    for (sharding, shape, replica), itemsize in itemsizes.items():
        table = sharding.table(shape)
        table.raise_unless_whole(shape)
        writers = table.ranks[:, replica]
        if not np.isin(writers, files).all():
            raise DamagedCheckpoint(f"{INDEX}: a shard lies in a file that is not there")
        np.add.at(needed, np.searchsorted(files, writers), table.numel * float(itemsize))
    for rank, size in zip(files.tolist(), needed.tolist(), strict=True):
        if size > sizes[tensor_file(rank)]:
            raise DamagedCheckpoint(f"{INDEX}: a shard lies beyond the end of {tensor_file(rank)}")


def check_headers(folder: Path, tensors: dict[str, StoredTensor], names: Sequence[str]) -> None:
    """Raises DamagedCheckpoint unless each of these files holds the shards that the index says. Also raises OSError."""
    for name in names:
        if name == INDEX:
            continue
        with open_file(folder / name) as file:
            entries = read_header(file, name)
        for tensor, stored in tensors.items():
            for box in stored.boxes_written_by(rank_of(name)):
                entries.find(tensor, stored, box)


class Header:
    """The header of a file of tensors: where its shards lie, as the file itself says. An entry is checked when it is
    looked up."""

    def __init__(self, file: str, entries: Any, start: int, size: int):
        self.file, self.entries, self.start, self.size = file, entries, start, size

    def find(self, name: str, stored: StoredTensor, box: Box) -> int:
        """Returns the first byte of a shard of a tensor. Raises DamagedCheckpoint."""
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


def _to_bytes(manifest: dict[str, Any]) -> bytes:
    """Returns the bytes of the file, the same for equal manifests."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()
