"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2): the sign of a momentum.

Half of AdamW's state. Its learning rate is 3 to 10 times lower than AdamW's, its weight decay as much higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trainer.config import schema
from trainer.optim.groups import by_decay, names


class Lion(torch.optim.Optimizer):
    """Lion. The state of a parameter is `exp_avg`, shaped like it; no step count is needed. `betas`: of the momentum
    whose sign is the direction, and of the momentum that is kept."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[torch.Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Does one step along the gradients. Returns the value of `closure`, which is called first."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients, lr = [parameter.grad for parameter in parameters], group["lr"]
            direction_beta, momentum_beta = group["betas"]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["exp_avg"] for parameter in parameters]
            directions = torch._foreach_lerp(momenta, gradients, 1 - direction_beta)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1 - momentum_beta)
        return loss


def lion(config: schema.Lion, model: nn.Module) -> torch.optim.Optimizer:
    """Returns Lion on the model's parameters, in two groups: with and without decay."""
    return Lion(by_decay(model, names(model), config.weight_decay, config.no_decay), config.lr, config.betas)
