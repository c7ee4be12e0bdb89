"""Models: map a batch to outputs, give every parameter its initial value by name, name their layers (`blocks`)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.randomness import key


class Model(Protocol):
    """What a model brings besides being an nn.Module."""

    blocks: nn.ModuleList

    def __call__(self, batch: dict[str, Tensor]) -> Tensor: ...

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Every parameter by (seed, its name): the same weights in any order, on any rank, under any sharding."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(key(seed, "init", name))
        value = torch.empty(parameter.shape, dtype=torch.float32)
        model.initialise(name, value, generator)  # type: ignore[operator]
        parameter.copy_(value)
