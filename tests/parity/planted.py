"""The field's bugs, planted: each must turn its cell of the matrix red."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tests.parity.cells import Cell, cells
from trainer.objectives import Batch
from trainer.strategies.pipeline import Pipeline
from trainer.strategies.single import Single


def bugs() -> Iterator[tuple[str, Cell, Callable[[Single], None]]]:
    """(name, the cell it is planted in, what plants it)."""
    known = {(cell.name, cell.processes): cell for cell in cells()}
    yield "ddp: a mean of the ranks' means", known["ddp", 2], mean_of_means
    yield "fsdp: a mean of the ranks' means", known["fsdp", 2], mean_of_means
    yield "fsdp: an average where a sum belongs", known["fsdp", 2], divided
    yield "ddp: a sum where an average belongs", known["ddp", 2], multiplied
    yield "pipeline: gradients not scaled by the count", known["pipeline 1f1b", 2], unscaled
    yield "pipeline: the norm of a process's own parts", known["pipeline 1f1b", 2], own_norm
    yield "pipeline: the ends' gradients not added up", known["pipeline 1f1b", 2], ends_apart


def mean_of_means(strategy: Single) -> None:
    def scale_of(micro_batches: Sequence[Batch], abandoned: bool) -> Tensor:
        count = sum(strategy.objective.count(batch) for batch in micro_batches)
        strategy.targets = torch.tensor(float(count))
        share = strategy.averaged_over / strategy.topology.dp_size
        return torch.tensor(share / max(1, count), dtype=torch.float64)

    strategy.scale_of = scale_of  # type: ignore[method-assign]


def divided(strategy: Single) -> None:
    strategy.averaged_over = 1 / strategy.topology.dp_size  # type: ignore[assignment]


def multiplied(strategy: Single) -> None:
    strategy.averaged_over = strategy.topology.dp_size**2


def unscaled(strategy: Single) -> None:
    strategy.targets = torch.tensor(1.0)
    strategy.scale_of = lambda micro_batches, abandoned: torch.tensor(1.0)  # type: ignore[method-assign]


def own_norm(strategy: Single) -> None:
    strategy.norm = torch.nn.utils.get_total_norm  # type: ignore[method-assign, assignment]


def ends_apart(strategy: Single) -> None:
    assert isinstance(strategy, Pipeline)
    strategy.ends = None
