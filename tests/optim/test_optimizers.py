"""Optimizers against their papers in fp64, and against torch's own on the parameters that each is to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.strategies import ragged
from trainer.config import schema
from trainer.optim.adamw import adamw
from trainer.optim.lion import lion
from trainer.optim.muon import muon, orthogonal

ADAMW = schema.AdamW(
    name="adamw", implementation="auto", lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    no_decay=["bias", "norm"], ema=None,
)  # fmt: skip
LION = schema.Lion(name="lion", lr=0.01, betas=(0.9, 0.99), weight_decay=0.5, no_decay=["bias", "norm"], ema=None)
MUON = schema.Muon(
    name="muon", lr=0.01, momentum=0.95, newton_schulz_steps=5, newton_schulz_dtype="fp32", adamw_modules=["lm_head"],
    betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, no_decay=["bias", "norm"], ema=None,
)  # fmt: skip
MADE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: adamw(ADAMW, model),
    "lion": lambda model: lion(LION, model),
    "muon": lambda model: muon(MUON, model),
}


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Random ones, the same for every model of these shapes."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in model.named_parameters()
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> dict[str, torch.Tensor]:
    for step in range(steps):
        for name, gradient in gradients(model, step).items():
            model.get_parameter(name).grad = gradient.to(model.get_parameter(name).dtype)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_lion_is_the_papers() -> None:
    found = train(made := ragged.model(torch.float64), lion(LION, made))
    for name, weight in ragged.model(torch.float64).named_parameters():
        decay = 0.5 if weight.ndim > 1 else 0.0  # biases and norms have none
        expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
        for step in range(4):
            gradient = gradients(made, step)[name]
            direction = (0.9 * momentum + 0.1 * gradient).sign()
            expected = expected - 0.01 * (direction + decay * expected)
            momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-14)


def test_muon_moves_hidden_matrices_and_adamw_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as torch's own does; torch's Muon is made to compute in fp32, too."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    model = ragged.model()
    model.lm_head = nn.Linear(24, 50)
    twin = ragged.model()
    twin.lm_head = nn.Linear(24, 50)
    twin.load_state_dict(model.state_dict())
    found = train(model, muon(MUON, model))
    hidden = {name: p for name, p in twin.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    assert len(hidden) == 8  # four of each of two layers
    by_muon = torch.optim.Muon(hidden.values(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for n, p in twin.named_parameters() if n not in hidden and (p.ndim > 1) == decayed]}
        | {"weight_decay": 0.1 if decayed else 0.0}
        for decayed in (True, False)
    ]
    by_adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        for name, gradient in gradients(twin, step).items():
            twin.get_parameter(name).grad = gradient.float()
        by_muon.step()
        by_adamw.step()
    for name, parameter in twin.named_parameters():
        if name in hidden:
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (24, 24)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrix, 5)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    exact = orthogonal(matrix.double(), 5)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    # The same singular vectors, each value put through the quintic.
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(exact, left @ torch.diag(values) @ right, rtol=0, atol=1e-9)
    assert 0.6 < values[:-2].min() < values.max() < 1.3


@pytest.mark.parametrize("name", sorted(MADE))
def test_the_state_is_tensors_by_parameter_and_the_rate_is_the_groups(name: str) -> None:
    """What a strategy relies on: it sets every group's rate, and saves and restores the state by parameter."""
    model = ragged.model()
    optimizer = MADE[name](model)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert all(torch.equal(before[key], weight) for key, weight in train(model, optimizer, 1).items())
    state: dict[Any, Any] = optimizer.state
    assert set(state) == set(model.parameters())
    assert all(isinstance(value, torch.Tensor) for values in state.values() for value in values.values())


@pytest.mark.parametrize("name", sorted(MADE))
def test_it_learns(name: str) -> None:
    model, objective = ragged.model(), ragged.Objective()
    optimizer, losses = MADE[name](model), []
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    for _ in range(40):
        batch = ragged.batch(0)
        totals = {name: torch.tensor(count) for name, count in objective.counts(batch).items()}
        loss, _ = objective.loss(model(batch), batch, totals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
