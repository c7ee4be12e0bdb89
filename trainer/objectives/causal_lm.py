"""Next-token prediction: cross-entropy summed over targets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import schema
from trainer.facts import Facts
from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Sums

IGNORE = -100


class CausalLM(Objective):
    """Learns to predict `targets` from `inputs`, both int64 [B, T]; a target of -100 is ignored.

    An evaluation also reports nats per character and bits per byte, which do not depend on the tokenizer.
    """

    Config = schema.CausalLM
    continues_text = True

    def __init__(self, config: schema.CausalLM, facts: Facts):
        super().__init__(config, facts)
        assert facts.tokenizer is not None
        text = [torch.from_numpy(facts.tokenizer.token_bytes), torch.from_numpy(facts.tokenizer.token_chars)]
        self._text = torch.stack(text).double()

    def counts(self, batch: Batch) -> dict[str, float]:
        return {NUM_TARGETS: int((batch["targets"] != IGNORE).sum())}

    def loss(self, outputs: Tensor, batch: Batch, normalizers: Normalizers) -> tuple[Tensor, Sums]:
        nats = F.cross_entropy(
            outputs.flatten(0, 1).float(), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return nats / normalizers[NUM_TARGETS], {"loss": nats}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        targets = batch["targets"].flatten()
        self._text = self._text.to(targets.device)
        text = (self._text[:, targets.clamp(min=0)] * (targets != IGNORE)).sum(dim=1)
        return {**super().evaluate(outputs, batch), "bytes": text[0], "chars": text[1]}

    def summary(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
        nats = sums["loss"]
        means = {"loss": nats / sums[NUM_TARGETS] if sums[NUM_TARGETS] else math.nan}
        if "chars" in sums:  # of an evaluation
            means["nats_per_char"] = nats / sums["chars"] if sums["chars"] else math.nan
            means["bits_per_byte"] = nats / math.log(2) / sums["bytes"] if sums["bytes"] else math.nan
        return means
