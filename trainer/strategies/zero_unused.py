"""Restores parameters without a gradient under ZeRO, whose optimizer steps on flat tensors of many parameters.

There they have a gradient of zeros: they would decay, and their momentum would go on. So their weights and optimizer
state are restored after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.patches import register_first_step_hook
from trainer.strategies.zero_engine import find_shard


class UnusedParameter(NamedTuple):
    """This rank's shard of a parameter, before a step that does not use it."""

    flat: Tensor
    elements: slice
    weight: Tensor
    state: dict[str, Tensor]
    """State of the optimizer, by kind; a kind that does not exist yet begins with zeros."""

    @classmethod
    def of(cls, engine: Any, optimizer: torch.optim.Optimizer, flat: Tensor, parameter: Any) -> UnusedParameter:
        start, size, _ = find_shard(engine, parameter)
        elements = slice(start, start + size)
        state = {kind: value.view(-1)[elements].clone() for kind, value in _elementwise_state(optimizer, flat)}
        return cls(flat, elements, flat.detach().view(-1)[elements].clone(), state)

    @torch.no_grad()
    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        self.flat.view(-1)[self.elements] = self.weight
        for kind, value in _elementwise_state(optimizer, self.flat):
            value.view(-1)[self.elements] = self.state.get(kind, 0.0)


def put_back_after_steps(optimizer: torch.optim.Optimizer, unused: Callable[[], Sequence[UnusedParameter]]) -> None:
    """Restores the parameters after each step of the optimizer, before any other hook sees the weights."""

    def put_back(*_: Any) -> None:
        for parameter in unused():
            parameter.put_back(optimizer)

    register_first_step_hook(optimizer, put_back)


def _elementwise_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> list[tuple[str, Tensor]]:
    """Returns the optimizer's state that has a number per element, but no average of weights: its count is shared."""
    state = optimizer.state.get(flat, {})
    kinds = [kind for kind, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    return [(kind, state[kind]) for kind in kinds if kind != "ema"]
