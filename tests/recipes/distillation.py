"""Distillation from a frozen teacher (Hinton et al. 2015): what it thinks of each next token is the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from trainer.config import Plugin
from trainer.objectives import NUM_TARGETS, Batch, Model, Normalizers, Objective, Sums, Update

TEMPERATURE, IGNORE = 2.0, -100


class Distillation(Objective):
    frozen = ("teacher",)

    class Config(Plugin):
        pass

    def counts(self, batch: Batch) -> dict[str, float]:
        return {NUM_TARGETS: int((batch["targets"] != IGNORE).sum())}

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        yield Update([batch | {"teacher": models["teacher"].infer(batch)} for batch in batches], self)

    def loss(self, outputs: Tensor, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
        soft = (batch["teacher"] / TEMPERATURE).softmax(dim=-1)
        nats = -(soft * (outputs / TEMPERATURE).log_softmax(dim=-1)).sum(dim=-1)
        loss = (nats * (batch["targets"] != IGNORE)).sum() * TEMPERATURE**2
        return loss / totals[NUM_TARGETS], {"loss": loss}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        targets = batch["targets"].flatten()
        return {"loss": F.cross_entropy(outputs.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")}
