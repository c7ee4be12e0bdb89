"""Computes how large an optimizer's state is, without any memory for it."""

from __future__ import annotations

import torch
from torch import nn


def optimizer_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of the weights of `model`, which is on the meta device, and of its optimizer's state, for which
    the optimizer does a step there."""
    for group in optimizer.param_groups:
        group.update({key: flag for key, flag in (("fused", False), ("foreach", True)) if key in group})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in (*model.state_dict().values(), *states))
