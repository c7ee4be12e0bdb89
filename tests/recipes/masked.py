"""A masked language model (Devlin et al. 2019, section 3.1, without its random words): masks are a function of the
row's draw, so they are the same on any process, and in every evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import Plugin
from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Sums
from trainer.randomness import key

MASKED, IGNORE = 0.15, -100


class MaskedLM(Objective):
    class Config(Plugin):
        pass

    def example(self, row: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(key(draw, "mask"))
        masked = torch.rand(row["inputs"].shape, generator=generator) < MASKED
        return {
            "inputs": row["inputs"].masked_fill(masked, self.facts.vocab_size - 1),
            "targets": row["inputs"].masked_fill(~masked, IGNORE),
        }

    def counts(self, batch: Batch) -> dict[str, float]:
        return {NUM_TARGETS: int((batch["targets"] != IGNORE).sum())}

    def loss(self, outputs: Tensor, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
        logits, targets = outputs.flatten(0, 1), batch["targets"].flatten()
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        return nats / totals[NUM_TARGETS], {"loss": nats, "accuracy": (logits.argmax(dim=-1) == targets).sum()}
