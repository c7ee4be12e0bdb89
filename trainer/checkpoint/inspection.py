"""Inspection of checkpoints, for people: what each is, and what differs between two. Nothing is changed."""

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


def split_step(a_rows: list[dict[str, Any]], b_rows: list[dict[str, Any]]) -> tuple[int, str] | None:
    """Returns the first step at which the rows of two runs' `metrics.jsonl` differ, and in what; None if there is
    none."""
    b_by_step = {row["step"]: row for row in b_rows}
    for row in a_rows:
        b_row = b_by_step.get(row["step"], {})
        for name in RECORDED:
            if {name} <= row.keys() & b_row.keys() and row[name] != b_row[name]:
                return row["step"], name
    return None


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a folder with a checkpoint's name. `problem`: why it does not count, if it does not."""

    path: Path
    bytes: int  # of all its files
    saved_at: float | None  # in seconds since the epoch; None without a manifest
    manifest: dict[str, Any]  # empty if it is damaged
    tensors: int | None
    problem: str | None

    def value_of(self, name: str) -> Any:
        """Returns an entry of the manifest by its dotted name; None if there is none. Its type is not checked."""
        value: Any = self.manifest
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def evaluation(self) -> dict[str, Any]:
        """Returns the metrics of the evaluation at the checkpoint's step."""
        value = self.value_of("evaluation")
        return value if isinstance(value, dict) else {}


def inspect_checkpoint(path: Path, *, contents: bool = False) -> CheckpointInfo | None:
    """Checks a checkpoint, its sizes only or also its `contents`. Returns None if it is gone, since a run may delete it
    at any time.

    Raises OSError if it cannot be read for now: that is not damage.
    """
    manifest, tensors, saved_at, problem = {}, None, None, None
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
        saved_at = (path / MANIFEST).lstat().st_mtime
    return CheckpointInfo(path, disk_usage(path), saved_at, manifest, tensors, problem) if path.is_dir() else None


def disk_usage(folder: Path) -> int:
    """Returns the bytes of all files in a folder and below it that are still there."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    rows: dict[str, Any] = {}
    for name, value in tree.items():
        rows |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return rows


def changes(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yields each entry in which two manifests differ: its dotted name, and the value in each (in a list; an empty one
    if there is none)."""
    for section in COMPARED:
        a_rows, b_rows = flatten(a.get(section), section), flatten(b.get(section), section)
        for name in {**a_rows, **b_rows}:
            a_values, b_values = ([rows[name]] if name in rows else [] for rows in (a_rows, b_rows))
            if a_values != b_values:
                yield name, a_values, b_values


class Difference(NamedTuple):
    """The largest difference between two tensors, absolute and relative to their largest element."""

    relative: float
    absolute: float
    name: str


@dataclass(frozen=True)
class Comparison:
    """How the tensors of two checkpoints compare."""

    only: tuple[list[str], list[str]]  # names that only one has
    reshaped: list[tuple[str, StoredTensor, StoredTensor]]  # of another type or shape
    equal: list[str]  # to the bit
    different: list[Difference]  # the largest first

    @property
    def same(self) -> bool:
        return not (*self.only[0], *self.only[1], *self.reshaped, *self.different)


def compare(a: FoundCheckpoint, b: FoundCheckpoint) -> Comparison:
    """Compares all tensors that both checkpoints have, a batch at a time. Raises DamagedCheckpoint; TrainingError if
    one cannot be read."""
    a_index, b_index = read_index(a.path, a.manifest), read_index(b.path, b.manifest)
    common = [name for name in a_index if name in b_index]
    comparable = [name for name in common if _kind(a_index[name]) == _kind(b_index[name])]
    equal, different = [], []
    for batch in _batches(comparable, a_index):
        x, y = _read(a, batch, a_index), _read(b, batch, b_index)
        for name in batch:
            if torch.equal(_bits(x[name]), _bits(y[name])):
                equal.append(name)
            else:
                different.append(Difference(*difference(x[name], y[name]), name))
    return Comparison(
        only=(sorted(a_index.keys() - b_index.keys()), sorted(b_index.keys() - a_index.keys())),
        reshaped=[
            (name, a_index[name], b_index[name]) for name in common if _kind(a_index[name]) != _kind(b_index[name])
        ],
        equal=equal,
        different=sorted(different, key=lambda pair: (-pair.relative, -pair.absolute, pair.name)),
    )


def difference(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Returns the relative and the absolute difference; infinite if one is not finite and the other is another
    number."""
    absolute, scale = 0.0, 0.0
    for a, b in zip(x.flatten().split(BLOCK), y.flatten().split(BLOCK), strict=True):
        a, b = a.double(), b.double()
        is_equal = (a == b) | (a.isnan() & b.isnan())
        distance = (a - b).abs().nan_to_num(nan=inf, posinf=inf).masked_fill(is_equal, 0)
        absolute = max(absolute, distance.max().item())
        scale = max(scale, *(block.abs().nan_to_num(0, posinf=0).max().item() for block in (a, b)))
    return (absolute / scale if absolute and scale else absolute), absolute


def _kind(stored: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return stored.dtype, stored.shape


def _size(stored: StoredTensor) -> int:
    return prod(stored.shape) * DTYPES[stored.dtype].itemsize


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _batches(names: list[str], stored: dict[str, StoredTensor]) -> Iterator[list[str]]:
    """Yields the names in batches, in order, each of at most BATCH bytes or of one tensor."""
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


def _read(checkpoint: FoundCheckpoint, names: list[str], stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
    tensors = {name: torch.empty(stored[name].shape, dtype=DTYPES[stored[name].dtype]) for name in names}
    read_state(checkpoint, tensors)
    return tensors
