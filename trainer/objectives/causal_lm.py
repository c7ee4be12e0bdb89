"""Next-token prediction: cross-entropy summed over targets."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import schema
from trainer.objectives import Batch, Sums

IGNORE = -100


class CausalLM:
    """`inputs`, `targets` int64 [B, T]; a target of -100 is none.

    `token_bytes` and `token_chars` int32 [vocabulary] say how much text a token stands for, so that an evaluation can
    be stated in nats a character and bits a byte, whatever the tokenizer.
    """

    Config = schema.CausalLM
    continues_text = True  # its models can be sampled from

    def __init__(self, config: schema.CausalLM, token_bytes: np.ndarray, token_chars: np.ndarray):
        self._text = torch.stack([torch.from_numpy(token_bytes), torch.from_numpy(token_chars)]).double()

    def count(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORE).sum())

    def loss(self, outputs: Tensor, batch: Batch) -> Sums:
        targets = batch["targets"].flatten()
        loss = F.cross_entropy(outputs.flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")
        return {"loss": loss, "count": (targets != IGNORE).sum()}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        targets = batch["targets"].flatten()
        self._text = self._text.to(targets.device)
        text = (self._text[:, targets.clamp(min=0)] * (targets != IGNORE)).sum(dim=1)
        return {**self.loss(outputs, batch), "bytes": text[0], "chars": text[1]}

    def summary(self, sums: dict[str, float]) -> dict[str, float]:
        nats = sums["loss"]
        return {
            "loss": nats / sums["count"] if sums["count"] else math.nan,
            "nats_per_char": nats / sums["chars"] if sums["chars"] else math.nan,
            "bits_per_byte": nats / math.log(2) / sums["bytes"] if sums["bytes"] else math.nan,
        }
