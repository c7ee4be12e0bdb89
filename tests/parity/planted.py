"""The field's bugs, planted: each must turn its cell of the matrix red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.parity.cells import Cell, cells
from trainer.objectives import Normalizers, Sums
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.pipeline import Pipeline


def bugs() -> Iterator[tuple[str, Cell, Callable[[StepArithmetic], None]]]:
    """(name, the cell it is planted in, what plants it)."""
    known = {(cell.name, cell.processes): cell for cell in cells()}
    yield "ddp: a mean of the ranks' means", known["ddp", 2], mean_of_means
    yield "fsdp: a mean of the ranks' means", known["fsdp", 2], mean_of_means
    yield "fsdp: an average where a sum belongs", known["fsdp", 2], divided
    yield "ddp: a sum where an average belongs", known["ddp", 2], multiplied
    yield "pipeline: gradients not scaled by the count", known["pipeline 1f1b", 2], unscaled
    yield "pipeline: the norm of a process's own parts", known["pipeline 1f1b", 2], own_norm
    yield "pipeline: the ends' gradients not added up", known["pipeline 1f1b", 2], ends_apart


def mean_of_means(strategy: StepArithmetic) -> None:
    """Every rank divides by its own targets; the mean of the ranks' means is not that of all."""
    totals_of, total = strategy.reduce_counts, strategy.all_reduce
    size = strategy.topology.dp_size

    def of_this_rank(*arguments: Any) -> tuple[Normalizers, Sums]:
        strategy.all_reduce = lambda sums: sums * size * strategy.topology.layout.processes  # type: ignore[method-assign]
        try:
            return totals_of(*arguments)
        finally:
            strategy.all_reduce = total  # type: ignore[method-assign]

    strategy.reduce_counts = of_this_rank  # type: ignore[method-assign]


def divided(strategy: StepArithmetic) -> None:
    strategy.num_averaged_ranks = 1 / strategy.topology.dp_size  # type: ignore[assignment]


def multiplied(strategy: StepArithmetic) -> None:
    strategy.num_averaged_ranks = strategy.topology.dp_size**2


def unscaled(strategy: StepArithmetic) -> None:
    totals_of = strategy.reduce_counts

    def ones(*arguments: Any) -> tuple[Normalizers, Sums]:
        totals, sums = totals_of(*arguments)
        return dict.fromkeys(totals, torch.tensor(1.0)), sums

    strategy.reduce_counts = ones  # type: ignore[method-assign]


def own_norm(strategy: StepArithmetic) -> None:
    strategy.norm = torch.nn.utils.get_total_norm  # type: ignore[method-assign, assignment]


def ends_apart(strategy: StepArithmetic) -> None:
    assert isinstance(strategy, Pipeline)
    strategy.ends = None
