"""Batches that are short of rows: where a validation split ends, or where samples were left out.

A process without a row still takes part in what all do, but many models cannot compute with no rows (`view(0, -1)`),
and in a pipeline no shape may change. So a batch is filled up, and what comes out of it is cut back.
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
    """Returns the first rows of a batch, or of what a model made of it: a tensor, or a tree of them."""
    return tree_map(lambda value: value[:rows], values)


def take_rows(batch: Batch, first: int, size: int, spare: Batch | None = None) -> Batch:
    """`size` rows of a batch from `first` on. What is missing is filled up with the first row of `spare`, an ordinary
    one, for the model has to be able to compute with it; with zeros where there is none."""
    filled = {}
    for name, value in batch.items():
        part = value[first : first + size]
        missing = size - len(part)
        filled[name] = torch.cat([part, _filler(value, missing, (spare or {}).get(name))]) if missing else part
    return filled


def _filler(value: Tensor, rows: int, spare: Tensor | None) -> Tensor:
    if spare is None or spare.shape[1:] != value.shape[1:]:
        return value.new_zeros((rows, *value.shape[1:]))
    return spare[:1].to(value).expand(rows, *value.shape[1:])
