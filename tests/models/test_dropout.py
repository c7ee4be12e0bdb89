"""Dropout by counters: statistics of a fair coin, and the same mask wherever a sequence is."""

from __future__ import annotations

import pytest
import torch

from trainer.models.dropout import dropout

X = torch.ones(32, 128, 96)
DRAWS = torch.randint(0, 2**62, (32,), generator=torch.Generator().manual_seed(0))


def dropped(p: float, site: int = 1, draws: torch.Tensor = DRAWS) -> torch.Tensor:
    return (dropout(X, p, draws, site) == 0).double()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    mask = dropped(p)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean() - p) < 5 * deviation
    assert dropout(X, p, DRAWS, 1).max().item() == pytest.approx(1 / (1 - p))
    # Along every axis the rates scatter as independent coins would.
    for axis, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        rates = mask.mean(dim=others)
        expected = (p * (1 - p) / (mask.numel() / mask.shape[axis])) ** 0.5
        assert rates.std() < 1.5 * expected


def test_masks_are_uncorrelated() -> None:
    p = 0.3
    mask = (dropped(p) - p) / (p * (1 - p)) ** 0.5
    other_site = (dropped(p, site=2) - p) / (p * (1 - p)) ** 0.5
    noise = 5 / mask.numel() ** 0.5
    assert abs((mask * other_site).mean()) < noise
    for axis in range(3):
        assert abs((mask * mask.roll(1, dims=axis)).mean()) < noise


def test_same_mask_in_any_micro_batch() -> None:
    whole = dropout(X, 0.4, DRAWS, 5)
    for start in range(0, 32, 8):
        part = slice(start, start + 8)
        assert torch.equal(dropout(X[part], 0.4, DRAWS[part], 5), whole[part])


def test_gradient_is_the_mask() -> None:
    x = torch.randn(32, 128, 96, requires_grad=True)
    dropout(x, 0.25, DRAWS, 3).sum().backward()
    assert torch.equal(x.grad, dropout(X, 0.25, DRAWS, 3))


@pytest.mark.slow
def test_compiled_it_is_the_same_mask() -> None:
    compiled = torch.compile(dropout)
    for site in (1, 2, 7):  # from the second on the compiler takes it for a variable
        assert torch.equal(compiled(X, 0.3, DRAWS, site), dropout(X, 0.3, DRAWS, site))


def test_off_is_identity() -> None:
    assert dropout(X, 0.0, DRAWS, 0) is X
    assert dropout(X, 0.5, None, 0) is X
