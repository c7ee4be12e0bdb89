"""Weights in Hugging Face's format: safetensors, one file or several with an index that tells what is where."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint.format import header
from trainer.checkpoint.state import NAMES, Box
from trainer.data.shared_work import WorkSharing
from trainer.files import replace_file, sync_folder

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
ENDS = 1 << 16  # bytes of numbers at each end of a file that a fingerprint covers
READ = 1 << 24  # bytes at a time


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically. One tensor is in memory at a time."""

    def chunks() -> Iterator[bytes | memoryview]:
        entries, offset = [], 0
        for name, tensor in tensors.items():
            entries.append((name, NAMES[tensor.dtype], Box((0,) * len(tensor.shape), tensor.shape), offset))
            offset += tensor.bytes
        yield header(entries, {"format": "pt", **metadata})
        for tensor in tensors.values():
            yield tensor.make().reshape(-1).view(torch.uint8).numpy().data

    replace_file(path, chunks())


def write_folder(folder: Path, tensors: Mapping[str, LazyTensor], largest: int, metadata: Mapping[str, str]) -> None:
    """Writes one file, or several with an index, of which none is larger than `largest` bytes unless one tensor is.

    Weights that are there are deleted first, and the index is written last, so that a reader finds one whole model or
    none.
    """
    for path in folder.iterdir():
        if path.name == INDEX or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name):
            path.unlink()
    sync_folder(folder)
    shards = _shards(tensors, largest)
    if len(shards) == 1:
        write_file(folder / ONE, tensors, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names}, metadata)
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    replace_file(folder / INDEX, json.dumps(index, indent=2).encode())


def _shards(tensors: Mapping[str, LazyTensor], largest: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.bytes
    return shards


class UnusableWeights(Exception):
    """Raised if weights cannot be read; the text says why."""


class TensorRef(NamedTuple):
    """The file that a tensor is in, and its shape."""

    file: Path
    shape: tuple[int, ...]


def find(path: Path) -> dict[str, TensorRef]:
    """Finds every tensor in a safetensors file, or in a folder that transformers or `write_folder` wrote, by name. Only
    headers are read. Raises UnusableWeights."""
    refs: dict[str, TensorRef] = {}
    for file in files(path):
        try:
            with safe_open(file, "pt") as tensors:
                refs |= {name: TensorRef(file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UnusableWeights(f"{file.name} cannot be read: {error}") from None
    return refs


def files(path: Path) -> list[Path]:
    """Returns the files of the weights. Raises UnusableWeights."""
    if path.is_file() and path.suffix not in PICKLES:
        return [path]
    if (path / ONE).is_file():
        return [path / ONE]
    if (path / INDEX).is_file():
        return [path / name for name in _files_in_index(path / INDEX)]
    pickles = [path.name] if path.is_file() else sorted(p.name for p in path.glob("*") if p.suffix in PICKLES)
    if pickles:
        advice = "read it in transformers and write it with save_pretrained, which makes safetensors"
        raise UnusableWeights(f"{pickles[0]} is a pickle, which can run any code when it is read; {advice}")
    if path.is_dir():
        raise UnusableWeights(f"the folder has neither {ONE} nor {INDEX}")
    raise UnusableWeights("no such file or folder; nothing is downloaded (`hf download NAME --local-dir FOLDER` does)")


def _files_in_index(index: Path) -> list[str]:
    """Returns the names of the files that an index lists, which are in its folder."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableWeights(f"{index.name} cannot be read: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or Path(name).suffix != ".safetensors":
            raise UnusableWeights(f"{index.name} names {name!r}, which is not a safetensors file in this folder")
    return names


def fingerprint(paths: Sequence[Path]) -> str:
    """Returns a digest that tells weights apart without reading all of them: of names, shapes and types, and of some
    numbers at both ends of each file. Where the files are does not matter."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(size.to_bytes(8, "little") + file.read(8 + header_bytes + ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def digest_of_contents(paths: Sequence[Path], team: WorkSharing, cache: Path) -> str:
    """Returns a digest of every byte of the files. All ranks of `team` call it, and each reads its share. The digest of
    a file is kept in the folder `cache` until the file changes. Raises ConfigError, Outage."""
    digests = team.share("weights compared", list(map(str, paths)), lambda path: _digest_of(Path(path), cache))
    return hashlib.blake2b("".join(digests).encode(), digest_size=32).hexdigest()


def _digest_of(path: Path, cache: Path) -> str:
    """Returns the digest of a file's contents, from the cache if it is there."""
    version = _version_of(path)
    cached_file = cache / "weights" / hashlib.blake2b(repr(version).encode(), digest_size=16).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", cached_digest := cached_file.read_text()):
            return cached_digest
    content_hash = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while chunk := file.read(READ):
            content_hash.update(chunk)
    digest = content_hash.hexdigest()
    if _version_of(path) == version:
        with suppress(OSError):  # a folder that cannot be written only costs time
            cached_file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cached_file, digest.encode())
    return digest


def _version_of(path: Path) -> tuple[str, int, int, int, int]:
    """Returns what differs after each change of a file: the change time of an inode cannot be set back, unlike the
    modification time."""
    stat = path.stat()
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
