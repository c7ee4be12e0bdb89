"""What a checkpoint is on disk: a folder `step-00000100/` of

- `rank-00000.safetensors`, ...: what each process wrote, in the safetensors format, one contiguous piece after another;
- `index.json`: of each tensor its type, its shape, and where its pieces lie;
- `manifest.json`, which came last: what the run was, size and checksum of every file, and its own checksum.

Nothing in it is executed: JSON and numbers, of which none is believed before it is checked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trainer.checkpoint.pieces import DTYPES, Box
from trainer.errors import TrainingError
from trainer.files import replace_file, sync_folder

VERSION = 2
MANIFEST, INDEX = "manifest.json", "index.json"
LARGEST_JSON = 1 << 30
CHUNK = 8 << 20  # bytes that are written, hashed or read at a time


class Damaged(Exception):
    """This checkpoint does not count; the text says why."""


class Place(NamedTuple):
    """Where a piece of a tensor lies: from byte `at` of a file."""

    file: str
    at: int
    box: Box


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint. Its pieces cover it, each element once."""

    dtype: str
    shape: tuple[int, ...]
    places: list[Place]

    @property
    def numel(self) -> int:
        return prod(self.shape)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def tensor_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


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
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, with its own checksum in it, and makes the folder durable."""
    write_file(folder / MANIFEST, [_written(manifest)])
    sync_folder(folder)


def amend_manifest(folder: Path, **more: Any) -> bool:
    """Replaces entries of a manifest that is there, as a whole and durably; returns whether that changed anything.
    Raises Damaged; OSError; TrainingError if it is not for us."""
    manifest = read_manifest(folder)
    if manifest == (amended := {**manifest, **more}):
        return False
    replace_file(folder / MANIFEST, _written(amended))
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own checksum. Raises Damaged; OSError; TrainingError if it is not for us."""
    try:
        raw = _small(folder / MANIFEST)
        manifest = json.loads(raw)
        del manifest["sha256"]
    except FileNotFoundError:
        raise Damaged("no manifest.json") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"manifest.json cannot be read: {error}") from None
    if raw != _written(manifest):
        raise Damaged("manifest.json does not match its own checksum")
    if manifest.get("version") != VERSION:
        raise TrainingError(f"{folder}: format version {manifest.get('version')}, this onecurve reads {VERSION}")
    try:
        for name, stated in manifest["files"].items():
            if not re.fullmatch(r"[\w-][\w.-]*", name) or {"bytes": int, "xxh3": str} != {
                k: type(v) for k, v in stated.items()
            }:
                raise Damaged(f"manifest.json: no file of a checkpoint: {name!r}")
        if folder.name.startswith("step-") and folder_name(int(manifest["step"])) != folder.name:
            raise Damaged(f"it is of step {manifest['step']}")
        manifest["files"][INDEX]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"manifest.json: {error!r}") from None
    return manifest


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Whether every file is there, of its size and a file. Raises Damaged; OSError."""
    for name, stated in manifest["files"].items():
        try:
            found = (folder / name).lstat()
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{name} is no file")
        if found.st_size != stated["bytes"]:
            raise Damaged(f"{name} has {found.st_size} bytes, not {stated['bytes']}")


def check_contents(folder: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Whether these files are what was written. Raises Damaged; OSError."""
    for name in names:
        digest = xxhash.xxh3_128()
        try:
            with open_file(folder / name) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
        if digest.hexdigest() != manifest["files"][name]["xxh3"]:
            raise Damaged(f"{name} does not match its checksum")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises Damaged; OSError; TrainingError if it is not for us."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    check_contents(folder, manifest, list(manifest["files"]))
    read_index(folder, manifest)
    return manifest


def write_index(path: Path, files: Sequence[str], tensors: dict[str, Stored]) -> dict[str, Any]:
    """As `write_file`."""
    number = {name: i for i, name in enumerate(files)}
    told = {
        name: [stored.dtype, stored.shape, [[number[place.file], place.at, *place.box] for place in stored.places]]
        for name, stored in tensors.items()
    }
    text = json.dumps({"files": list(files), "tensors": told}, separators=(",", ":"))
    return write_file(path, [text.encode()])


def read_index(folder: Path, manifest: dict[str, Any]) -> dict[str, Stored]:
    """Every tensor by name. Raises Damaged where it does not describe tensors that lie in the manifest's files."""
    try:
        index = json.loads(_small(folder / INDEX))
        files, sizes = index["files"], {name: stated["bytes"] for name, stated in manifest["files"].items()}
        found = {}
        for name, (dtype, shape, places) in index["tensors"].items():
            made = [Place(files[file], at, Box(tuple(offset), tuple(size))) for file, at, offset, size in places]
            found[name] = Stored(dtype, tuple(shape), made)
            if problem := _problem(found[name], sizes):
                raise Damaged(f"{INDEX}: '{name}': {problem}")
    except FileNotFoundError:
        raise Damaged(f"no {INDEX}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{INDEX} cannot be read: {error!r}") from None
    return found


def open_file(path: Path) -> Any:
    """For reading. Raises OSError; Damaged for a link or a pipe: what a checkpoint holds lies in it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged(f"{path.name} is no file") from None
        raise
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise Damaged(f"{path.name} is no file")
    return file


def _problem(stored: Stored, sizes: dict[str, int]) -> str | None:
    """Why these are not all pieces of such a tensor. No number is used before it is known to be a sensible one."""
    numbers = [*stored.shape, *(n for place in stored.places for n in (place.at, *place.box.offset, *place.box.size))]
    if stored.dtype not in DTYPES:
        return f"unknown type {stored.dtype!r}"
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        return "sizes and offsets are whole numbers"
    whole, itemsize = Box((0,) * len(stored.shape), stored.shape), DTYPES[stored.dtype].itemsize
    for place in stored.places:
        if len(place.box.offset) != len(stored.shape) or len(place.box.size) != len(stored.shape):
            return "a piece has other dimensions"
        if place.box.meet(whole) != place.box:
            return "a piece lies outside"
        if place.at + place.box.numel * itemsize > sizes[place.file]:
            return f"a piece lies beyond the end of {place.file}"
    if sum(place.box.numel for place in stored.places) != prod(stored.shape) or _overlap(stored.places):
        return "its pieces do not make it up"
    return None


def _overlap(places: Sequence[Place]) -> bool:
    """Whether an element is in two of them. Sorted by where they begin, only a few lie beside each other."""
    beside: list[Box] = []
    for _, _, box in sorted(places, key=lambda place: place.box.offset):
        beside = [other for other in beside if not box.offset or other.offset[0] + other.size[0] > box.offset[0]]
        if any(box.meet(other) for other in beside):
            return True
        beside.append(box)
    return False


def _small(path: Path) -> bytes:
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_JSON:
            raise Damaged(f"{path.name} is absurdly large")
        return file.read()


def _written(manifest: dict[str, Any]) -> bytes:
    """The bytes of the file: one text for one manifest."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()
