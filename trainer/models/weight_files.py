"""Weights as Hugging Face keeps them: safetensors, one file or several with an index that tells what is where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.format import header
from trainer.checkpoint.pieces import NAMES, Box
from trainer.files import replace_file, sync_folder

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Mapping[str, Later], about: Mapping[str, str]) -> None:
    """A safetensors file, whole or not there at all. One tensor is in memory at a time."""

    def parts() -> Iterator[bytes | memoryview]:
        entries, at = [], 0
        for name, tensor in tensors.items():
            entries.append((name, NAMES[tensor.dtype], Box((0,) * len(tensor.shape), tensor.shape), at))
            at += tensor.bytes
        yield header(entries, {"format": "pt", **about})
        for tensor in tensors.values():
            yield memoryview(tensor.make().reshape(-1).view(torch.uint8).numpy())

    replace_file(path, parts())


def write_folder(folder: Path, tensors: Mapping[str, Later], largest: int, about: Mapping[str, str]) -> None:
    """One file, or as many as it takes for none to be larger than `largest` (unless one tensor is) and their index.

    Weights that are there go first, the index comes last: what is found is one whole model, or none.
    """
    for path in folder.iterdir():
        if path.name == INDEX or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name):
            path.unlink()
    sync_folder(folder)
    shards = _shards(tensors, largest)
    if len(shards) == 1:
        write_file(folder / ONE, tensors, about)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names}, about)
        places |= dict.fromkeys(names, file)
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    replace_file(folder / INDEX, json.dumps(index, indent=2).encode())


def _shards(tensors: Mapping[str, Later], largest: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.bytes
    return shards
