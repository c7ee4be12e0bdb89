"""Documents packed into one sequence give what each gives alone: logits, loss and gradients, in fp64."""

from __future__ import annotations

import pytest
import torch

from trainer.config.schema import GPT as GPTConfig
from trainer.facts import Facts
from trainer.models import initialise
from trainer.models.gpt import GPT


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_document_does_not_see_its_neighbors(positions: str) -> None:
    config = GPTConfig(
        name="gpt",
        layers=2,
        width=32,
        heads=4,
        dropout=0.0,
        positions=positions,
        activation="gelu",
        bias=True,
        fused_norm=False,
    )  # type: ignore[arg-type]
    model = GPT(config, Facts(50, 24, steps=1))
    initialise(model, seed=3)
    model.double()
    lengths, generator = [5, 1, 11, 4], torch.Generator().manual_seed(1)
    alone = [torch.randint(0, 50, (1, length), generator=generator) for length in lengths]
    packed = torch.cat([*alone, torch.zeros(1, 3, dtype=torch.int64)], dim=1)  # and padding behind them
    documents = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * 3])
    places = torch.tensor([[p for length in lengths for p in range(length)] + [0] * 3])

    def gradient(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    together = model({"inputs": packed, "documents": documents, "positions": places})
    separate = [model({"inputs": tokens}) for tokens in alone]
    torch.testing.assert_close(together[:, : sum(lengths)], torch.cat(separate, dim=1), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradient([together[:, : sum(lengths)]]), gradient(separate), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    unmasked = model({"inputs": packed})
    assert (unmasked[:, 6 : sum(lengths)] - together[:, 6 : sum(lengths)]).abs().max() > 1e-3
