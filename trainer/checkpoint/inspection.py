"""Looking at checkpoints, for people: what each is, and what differs between two. Nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.format import (
    MANIFEST,
    DamagedCheckpoint,
    StoredTensor,
    check_sizes,
    read_index,
    read_manifest,
    verify,
)
from trainer.checkpoint.load import FoundCheckpoint, read_state
from trainer.checkpoint.state import DTYPES
from trainer.errors import TrainingError

RECORDED = ("loss", "grad_norm", "fingerprint")  # of a step's row in metrics.jsonl
COMPARED = ("config", "identity", "topology", "progress")  # what two manifests are compared in
BATCH = 256 << 20  # bytes of tensors that are read together
BLOCK = 1 << 22  # numbers that are compared at a time, in float64


def split_step(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The first step at which the rows of two runs' `metrics.jsonl` differ, and in what; None where they never do."""
    theirs = {row["step"]: row for row in other}
    for row in one:
        for name in RECORDED:
            if {name} <= row.keys() & theirs.get(row["step"], {}).keys() and row[name] != theirs[row["step"]][name]:
                return row["step"], name
    return None


@dataclass(frozen=True)
class CheckpointInfo:
    """A folder with a checkpoint's name. `problem`: why it does not count, if it does not."""

    path: Path
    bytes: int  # that its files have
    written: float | None  # when; None without a manifest
    manifest: dict[str, Any]  # empty where it cannot be believed
    tensors: int | None
    problem: str | None

    def value_of(self, name: str) -> Any:
        """An entry of the manifest by its dotted name; None where there is none. Its types are not checked."""
        value: Any = self.manifest
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def evaluation(self) -> dict[str, Any]:
        """What was measured at its step."""
        value = self.value_of("evaluation")
        return value if isinstance(value, dict) else {}


def inspect_checkpoint(path: Path, *, contents: bool = False) -> CheckpointInfo | None:
    """Checks it, its sizes only or also its `contents`. None if it is gone: a run deletes while others look.

    Raises OSError where it cannot be read for now: that is not damage.
    """
    manifest, tensors, written, problem = {}, None, None, None
    try:
        manifest = read_manifest(path)
        check_sizes(path, manifest)
        tensors = len(read_index(path, manifest))
        if contents:
            verify(path)
    except (DamagedCheckpoint, TrainingError) as error:
        problem = str(error).removeprefix(f"{path}: ")
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    with suppress(FileNotFoundError, NotADirectoryError):
        written = (path / MANIFEST).lstat().st_mtime
    return CheckpointInfo(path, disk_usage(path), written, manifest, tensors, problem) if path.is_dir() else None


def disk_usage(folder: Path) -> int:
    """Bytes of all files in a folder and below it, as far as they are still there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    rows: dict[str, Any] = {}
    for name, value in tree.items():
        rows |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return rows


def changes(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """What two manifests tell differently: dotted name, and what each has there (a list of it; empty for nothing)."""
    for part in COMPARED:
        before, after = flatten(a.get(part), part), flatten(b.get(part), part)
        for name in {**before, **after}:
            ours, theirs = ([rows[name]] if name in rows else [] for rows in (before, after))
            if ours != theirs:
                yield name, ours, theirs


class Difference(NamedTuple):
    """The largest difference between two tensors, absolute and relative to their largest element."""

    relative: float
    absolute: float
    name: str


@dataclass(frozen=True)
class Comparison:
    only: tuple[list[str], list[str]]  # names that only one has
    reshaped: list[tuple[str, StoredTensor, StoredTensor]]  # of another type or shape
    equal: list[str]  # to the bit
    different: list[Difference]  # the largest first

    @property
    def same(self) -> bool:
        return not (*self.only[0], *self.only[1], *self.reshaped, *self.different)


def compare(a: FoundCheckpoint, b: FoundCheckpoint) -> Comparison:
    """Reads all that both have, a batch at a time. Raises DamagedCheckpoint; TrainingError where it cannot be read."""
    ours, theirs = read_index(a.path, a.manifest), read_index(b.path, b.manifest)
    both = [name for name in ours if name in theirs]
    alike = [name for name in both if _kind(ours[name]) == _kind(theirs[name])]
    equal, different = [], []
    for batch in _batches(alike, ours):
        x, y = _read(a, batch, ours), _read(b, batch, theirs)
        for name in batch:
            if torch.equal(_bits(x[name]), _bits(y[name])):
                equal.append(name)
            else:
                different.append(Difference(*difference(x[name], y[name]), name))
    return Comparison(
        only=(sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())),
        reshaped=[(name, ours[name], theirs[name]) for name in both if _kind(ours[name]) != _kind(theirs[name])],
        equal=equal,
        different=sorted(different, key=lambda it: (-it.relative, -it.absolute, it.name)),
    )


def difference(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Relative and absolute. Infinite where one is not finite and the other is another number."""
    absolute, scale = 0.0, 0.0
    for a, b in zip(x.flatten().split(BLOCK), y.flatten().split(BLOCK), strict=True):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        apart = (a - b).abs().nan_to_num(nan=inf, posinf=inf).masked_fill(same, 0)
        absolute = max(absolute, apart.max().item())
        scale = max(scale, *(it.abs().nan_to_num(0, posinf=0).max().item() for it in (a, b)))
    return (absolute / scale if absolute and scale else absolute), absolute


def _kind(stored: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return stored.dtype, stored.shape


def _size(stored: StoredTensor) -> int:
    return prod(stored.shape) * DTYPES[stored.dtype].itemsize


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _batches(names: list[str], stored: dict[str, StoredTensor]) -> Iterator[list[str]]:
    """In their order, each of at most BATCH bytes or of one tensor."""
    batch: list[str] = []
    size = 0
    for name in names:
        if batch and size + _size(stored[name]) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += _size(stored[name])
    if batch:
        yield batch


def _read(found: FoundCheckpoint, names: list[str], stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
    tensors = {name: torch.empty(stored[name].shape, dtype=DTYPES[stored[name].dtype]) for name in names}
    read_state(found, tensors)
    return tensors
