"""How large an optimizer's state is, found without any memory for it."""

from __future__ import annotations

import torch
from torch import nn


def optimizer_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the weights of `model`, which has no values (it is on the meta device), and of what its optimizer keeps
    of them: it does a step there."""
    for group in optimizer.param_groups:
        group.update({key: flag for key, flag in (("fused", False), ("foreach", True)) if key in group})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in (*model.state_dict().values(), *kept))
