"""Pads batches that are short of rows: where a validation split ends, or where samples were left out.

A rank without rows still takes part in collectives, but many models cannot compute with no rows (`view(0, -1)`), and in
a pipeline no shape may change. So a batch is padded, and its outputs are trimmed.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trainer.objectives import Batch

T = TypeVar("T")


def num_rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def trim_rows(values: T, rows: int) -> T:
    """Returns the first rows of a batch or of a model's outputs for it: a tensor, or a tree of tensors."""
    return tree_map(lambda value: value[:rows], values)


def take_rows(batch: Batch, first: int, size: int, spare: Batch | None = None) -> Batch:
    """Returns `size` rows of a batch from `first` on. Missing rows are copies of the first row of `spare`, an ordinary
    row that the model can compute with; without one they are zeros."""
    padded = {}
    for name, value in batch.items():
        part = value[first : first + size]
        num_missing = size - len(part)
        padded[name] = torch.cat([part, _filler(value, num_missing, (spare or {}).get(name))]) if num_missing else part
    return padded


def _filler(value: Tensor, rows: int, spare: Tensor | None) -> Tensor:
    if spare is None or spare.shape[1:] != value.shape[1:]:
        return value.new_zeros((rows, *value.shape[1:]))
    return spare[:1].to(value).expand(rows, *value.shape[1:])
