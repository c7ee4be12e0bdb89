"""Contrastive learning over the global batch (InfoNCE, van den Oord et al. 2018; SimCSE, Gao et al. 2021): two masked
views of a row find each other among those of all rows. The loss is not a sum over rows: its gradient with respect to
each embedding is, once all of them are known (GradCache, Gao et al. 2021, "Scaling deep contrastive learning")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.models import Net
from trainer.config import Plugin
from trainer.objectives import NUM_TARGETS, Batch, Model, Normalizers, Objective, Rows, Sums, Update
from trainer.randomness import key

TEMPERATURE, MASKED = 0.1, 0.3


class Encoder(Net):
    """`inputs` int64 [B, 2, T] -> embeddings [B, 2, width] of length 1."""

    def project(self, x: Tensor, batch: Batch) -> Tensor:
        return F.normalize(self.head(x.mean(dim=2)), dim=-1)


def info_nce(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Returns of embeddings [N, 2, width] the loss of each row [N], and whether its view was found [N]."""
    similarity = embeddings[:, 0] @ embeddings[:, 1].T / TEMPERATURE
    own = torch.arange(len(embeddings), device=embeddings.device)
    return F.cross_entropy(similarity, own, reduction="none"), similarity.argmax(dim=1) == own


class Contrastive(Objective):
    class Config(Plugin):
        pass

    def example(self, row: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        def view(number: int) -> Tensor:
            generator = torch.Generator().manual_seed(key(draw, "view", number))
            masked = torch.rand(row["inputs"].shape, generator=generator) < MASKED
            return row["inputs"].masked_fill(masked, self.facts.vocab_size - 1)

        return {"inputs": torch.stack([view(0), view(1)])}

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        model, sizes = models["model"], [len(batch["draws"]) for batch in batches]
        everyone = model.gather_rows(torch.cat([model.infer(batch) for batch in batches])).requires_grad_()
        losses, found = info_nce(everyone)
        (slopes,) = torch.autograd.grad(losses.mean(), everyone)
        fields = {"slope": slopes, "nats": losses.detach(), "found": found.float()}
        local = {name: model.local_rows(value, sum(sizes)).split(sizes) for name, value in fields.items()}
        yield Update(
            [batch | {name: parts[i] for name, parts in local.items()} for i, batch in enumerate(batches)], self
        )

    def loss(self, outputs: Tensor, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
        return (outputs * batch["slope"]).sum(), {"loss": batch["nats"].sum(), "accuracy": batch["found"].sum()}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        return {}

    def rows(self, outputs: Tensor, batch: Batch) -> Rows:
        return {"embeddings": outputs}

    def summary(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
        if not rows:
            return {name: value / sums[NUM_TARGETS] for name, value in sums.items() if name != NUM_TARGETS}
        losses, found = info_nce(rows["embeddings"].double())
        return {"loss": float(losses.mean()), "accuracy": float(found.double().mean())}
