"""Muon (Jordan et al. 2024) on the hidden matrices of a model, AdamW on all other parameters.

A matrix moves along its orthogonalized momentum. Rates are scaled as Liu et al. 2025 ("Muon is scalable for LLM
training", section 2.2) do, so that one learning rate and weight decay fit both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import schema
from trainer.optim.groups import by_decay, kind, names, shape_of
from trainer.optim.matrix_owners import map_whole_matrices

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: as steep at 0 as the quintic stays near 1 elsewhere
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Muon(torch.optim.Optimizer):
    """Muon in any data type. torch's own computes in bf16 only, which turns the rounding of a gradient into a
    difference of 1e-4 within 20 steps: no longer one curve on any number of processes.

    Parameters are matrices [m, n]. The state of each is `momentum_buffer`, shaped like it. `dtype`: of the
    Newton-Schulz steps.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps, self.dtype = steps, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Does one step along the gradients. Returns the value of `closure`, which is called first."""
        with torch.enable_grad():
            loss = closure() if closure else None
        entries = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]

        def momentum(number: int) -> Tensor:
            parameter, group = entries[number]
            return self._momentum(parameter, group["momentum"])

        parameters = [parameter for parameter, _ in entries]
        for number, direction in map_whole_matrices(
            parameters, momentum, lambda matrix: orthogonal(matrix, self.steps)
        ):
            parameter, lr = parameters[number], entries[number][1]["lr"]
            parameter.mul_(1 - lr * entries[number][1]["weight_decay"])
            parameter.add_(direction.to(parameter.dtype), alpha=-lr * 0.2 * math.sqrt(max(parameter.shape)))
        return loss

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Updates and returns Nesterov's momentum, in the data type of the Newton-Schulz steps."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum).to(self.dtype)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Returns about U V^T of the matrix U S V^T, [m, n]: Newton-Schulz steps of a quintic bring singular values near
    1."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: it has their groups and their state, and steps them all."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = list(optimizers)
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Does one step of each. Returns the value of `closure`, which is called first."""
        loss = closure() if closure else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def muon(config: schema.Muon, model: nn.Module) -> torch.optim.Optimizer:
    """Returns Muon on matrices that are neither embeddings nor in modules named in `config.adamw_modules`, with torch's
    fused AdamW on all other parameters."""
    hidden = [name for name in names(model) if _is_hidden(model, name, config.adamw_modules)]
    other_names = [name for name in names(model) if name not in set(hidden)]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        groups = by_decay(model, hidden, config.weight_decay, config.no_decay)
        dtype = _DTYPES[config.newton_schulz_dtype]
        optimizers.append(Muon(groups, config.lr, config.momentum, steps=config.newton_schulz_steps, dtype=dtype))
    if other_names or not hidden:
        groups = by_decay(model, other_names, config.weight_decay, config.no_decay)
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    return CombinedOptimizer(optimizers)


def _is_hidden(model: nn.Module, name: str, adamw_modules: Sequence[str]) -> bool:
    modules, shape = name.split(".")[:-1], shape_of(model.get_parameter(name))
    return len(shape) == 2 and kind(model, name) == "matrix" and not set(modules) & set(adamw_modules)
