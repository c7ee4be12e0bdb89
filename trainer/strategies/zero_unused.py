"""Parameters without a gradient under ZeRO, whose optimizer steps on flat tensors of many parameters.

There they have a gradient of zeros: they would decay, and their momentum would go on. So what lies there of them is put
back behind the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.patches import first_behind_steps
from trainer.strategies.zero_engine import piece


class UnusedParameter(NamedTuple):
    """What this process keeps of a parameter, before a step that does not use it."""

    flat: Tensor
    place: slice
    weight: Tensor
    state: dict[str, Tensor]
    """The optimizer's, by kind; a kind that is not there yet begins with zeros."""

    @classmethod
    def of(cls, engine: Any, optimizer: torch.optim.Optimizer, flat: Tensor, parameter: Any) -> UnusedParameter:
        start, size, _ = piece(engine, parameter)
        place = slice(start, start + size)
        state = {kind: value.view(-1)[place].clone() for kind, value in _kinds(optimizer, flat)}
        return cls(flat, place, flat.detach().view(-1)[place].clone(), state)

    @torch.no_grad()
    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        self.flat.view(-1)[self.place] = self.weight
        for kind, value in _kinds(optimizer, self.flat):
            value.view(-1)[self.place] = self.state.get(kind, 0.0)


def put_back_after_steps(optimizer: torch.optim.Optimizer, unused: Callable[[], Sequence[UnusedParameter]]) -> None:
    """Behind each step of the optimizer, before any other hook there sees the weights."""

    def hook(*_: Any) -> None:
        for one in unused():
            one.put_back(optimizer)

    first_behind_steps(optimizer, hook)


def _kinds(optimizer: torch.optim.Optimizer, flat: Tensor) -> list[tuple[str, Tensor]]:
    """What the optimizer keeps of each element. Not an average of weights: that has one count for all of them."""
    state = optimizer.state.get(flat, {})
    of_elements = [kind for kind, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    return [(kind, state[kind]) for kind in of_elements if kind != "ema"]
