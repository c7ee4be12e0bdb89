"""Objectives: the user's side of a step. Losses are sums over targets; the strategy divides by the global count."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

Batch = dict[str, Tensor]
Sums = dict[str, Tensor]  # scalars that add up over micro-batches and ranks; "loss" and "count" always among them


class Objective(Protocol):
    def count(self, batch: Batch) -> int:
        """How many targets a batch (on the CPU) has, before any forward pass."""
        ...

    def loss(self, outputs: Tensor, batch: Batch) -> Sums:
        """`loss` (a sum over targets, with its graph) and `count`. Other sums are added up, but not recorded yet."""
        ...

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        """As `loss`, with the sums that `summary` needs."""
        ...

    def summary(self, sums: dict[str, float]) -> dict[str, float]:
        """What an evaluation's global sums mean to a person; `loss` is the mean over targets."""
        ...
