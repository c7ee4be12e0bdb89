"""A small model and batches whose sequences differ in how many targets they have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer import objectives
from trainer.config import schema
from trainer.facts import Facts
from trainer.models import ModelFactory, cast_parameters
from trainer.models.gpt import GPT
from trainer.objectives import NUM_TARGETS, Normalizers, Sums
from trainer.objectives.causal_lm import IGNORE

VOCABULARY, LENGTH, SEQUENCES, CLIP, LR = 50, 16, 8, 0.5, 0.01
FACTS = Facts(VOCABULARY, LENGTH, steps=1)
# AdamW multiplies the rounding of a small gradient by up to LR / epsilon: with an epsilon of 1e-8 that alone would be
# 5e-6 of a weight in fp32, more or less with the CPU.
EPSILON = 1e-4
GPT2 = {"positions": "learned", "activation": "gelu", "bias": True, "fused_norm": False}
SHAPE = schema.GPT(name="gpt", layers=2, width=24, heads=2, dropout=0.0, **GPT2)


class Objective(objectives.Objective):
    """Causal LM without the text statistics."""

    def __init__(self) -> None:
        super().__init__(None, FACTS)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, float]:
        return {NUM_TARGETS: int((batch["targets"] != IGNORE).sum())}

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], totals: Normalizers) -> tuple[Tensor, Sums]:
        logits = outputs.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(logits, batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")
        return loss / totals[NUM_TARGETS], {"loss": loss}


def factory(dtype: torch.dtype) -> ModelFactory:
    return ModelFactory(lambda: cast_parameters(GPT(SHAPE, FACTS), dtype), seed=5)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return factory(dtype)()


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=LR, eps=EPSILON, fused=True)


def batch(step: int, sequences: int = SEQUENCES) -> dict[str, Tensor]:
    """Sequence i keeps about i / sequences of its targets, the first one none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (sequences, LENGTH + 1), generator=generator)
    share = torch.arange(sequences)[:, None] / sequences
    masked = torch.rand(sequences, LENGTH, generator=generator) >= share
    targets = tokens[:, 1:].masked_fill(masked, IGNORE)
    return {"inputs": tokens[:, :-1], "targets": targets, "draws": torch.arange(sequences)}
