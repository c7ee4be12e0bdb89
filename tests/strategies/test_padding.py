"""Batches that are short of rows are filled up with ordinary ones."""

from __future__ import annotations

import torch

from trainer.strategies.padding import num_rows, take_rows, trim_rows

BATCH = {"inputs": torch.arange(6).view(3, 2), "weight": torch.tensor([0.5, 1.0, 2.0])}
SPARE = {"inputs": torch.tensor([[7, 8]]), "weight": torch.tensor([9.0], dtype=torch.float64)}


def test_what_is_there_comes_first() -> None:
    filled = take_rows(BATCH, 2, 3, SPARE)
    assert filled["inputs"].tolist() == [[4, 5], [7, 8], [7, 8]]
    assert filled["weight"].tolist() == [2.0, 9.0, 9.0]
    assert filled["weight"].dtype is torch.float32
    assert trim_rows(filled, 1)["inputs"].tolist() == [[4, 5]]
    assert take_rows(BATCH, 0, 2)["inputs"].tolist() == [[0, 1], [2, 3]]


def test_without_a_row_or_of_another_shape_it_is_zeros() -> None:
    nothing = trim_rows(BATCH, 0)
    assert num_rows(nothing) == 0
    assert take_rows(nothing, 0, 2)["inputs"].tolist() == [[0, 0], [0, 0]]
    assert take_rows(nothing, 0, 2, {"inputs": torch.ones(1, 5)})["inputs"].tolist() == [[0, 0], [0, 0]]
