"""A generative adversarial network (Goodfellow et al. 2014, section 3, with the loss that does not saturate): points
are made of noise, and a discriminator with an optimizer of its own tells them from those of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import Plugin
from trainer.facts import Facts
from trainer.objectives import NUM_TARGETS, Batch, Model, Normalizers, Objective, Sums, Update

NOISE, WIDTH, POINT = 4, 16, 16


class Generator(nn.Module):
    """`noise` [B, 4] -> points [B, 16]."""

    class Config(Plugin):
        pass

    field, sizes = "noise", (NOISE, WIDTH, POINT)

    def __init__(self, config: Config, facts: Facts):
        super().__init__()
        first, hidden, last = self.sizes
        self.blocks = nn.ModuleList([nn.Linear(first, hidden), nn.Linear(hidden, hidden)])
        self.head = nn.Linear(hidden, last)

    def forward(self, batch: Batch) -> Tensor:
        x = batch[self.field]
        for block in self.blocks:
            x = F.gelu(block(x))
        return self.head(x)

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, 0.3, generator=generator)


class Discriminator(Generator):
    """`points` [B, n, 16] -> how real they look, [B, n]."""

    field, sizes = "points", (POINT, WIDTH, 1)

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch).squeeze(-1)


class TellApart(Objective):
    """Of `points` [B, 2, 16] the first is real, the second made."""

    def loss(self, outputs: Tensor, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
        real, made = outputs.unbind(dim=1)
        loss = (F.softplus(-real) + F.softplus(made)).sum()
        return loss / totals[NUM_TARGETS], {"loss": loss}


class GAN(Objective):
    trained = ("discriminator",)

    class Config(Plugin):
        pass

    def __init__(self, config: Config, facts: Facts):
        super().__init__(config, facts)
        self.tell_apart = TellApart(config, facts)

    def example(self, row: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(draw))
        return {"real": row["inputs"] / self.facts.vocab_size, "noise": noise}

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        generator, discriminator = models["model"], models["discriminator"]
        made = [generator.infer(batch) for batch in batches]
        pairs = [torch.stack([batch["real"].to(fake), fake], dim=1) for batch, fake in zip(batches, made, strict=True)]
        judged = [batch | {"points": pair} for batch, pair in zip(batches, pairs, strict=True)]
        yield Update(judged, self.tell_apart, "discriminator")
        asked = [batch | {"points": fake[:, None]} for batch, fake in zip(batches, made, strict=True)]
        slopes = [discriminator.gradient(batch, "points", lambda y, _: F.softplus(-y).sum())[:, 0] for batch in asked]
        nats = [F.softplus(-discriminator.infer(batch))[:, 0] for batch in asked]
        yield Update([b | {"slope": s, "nats": n} for b, s, n in zip(batches, slopes, nats, strict=True)], self)

    def loss(self, outputs: Tensor, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
        return (outputs * batch["slope"]).sum() / totals[NUM_TARGETS], {"loss": batch["nats"].sum()}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        return {"loss": (outputs - batch["real"]).square().mean(dim=1).sum()}
