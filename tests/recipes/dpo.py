"""Direct preference optimization (Rafailov et al. 2023, equation 7) on pairs: of each text its own order of tokens is
preferred to one that is shuffled. The reference is the frozen model that the run starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import Plugin
from trainer.objectives import NUM_TARGETS, Batch, Model, Normalizers, Objective, Sums, Update
from trainer.randomness import key

BETA = 0.5


def log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Of pairs: logits [B, 2, T, vocabulary], targets [B, 2, T] -> [B, 2]."""
    return logits.log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1).sum(dim=-1)


class DPO(Objective):
    frozen = ("reference",)

    class Config(Plugin):
        pass

    def example(self, row: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(key(draw, "shuffle"))
        order = torch.randperm(len(row["inputs"]), generator=generator)
        pair = torch.stack([row["inputs"], row["inputs"][order]])
        return {"inputs": pair, "targets": pair.roll(-1, dims=1)}

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        yield Update([self._with_reference(batch, models["reference"]) for batch in batches], self)

    def _with_reference(self, batch: Batch, reference: Model) -> Batch:
        outputs = reference.infer(batch)
        return batch | {"reference": log_likelihood(outputs, batch["targets"].to(outputs.device))}

    def loss(self, outputs: Tensor, batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
        better, worse = (log_likelihood(outputs, batch["targets"]) - batch["reference"]).unbind(dim=1)
        loss = -F.logsigmoid(BETA * (better - worse)).sum()
        return loss / totals[NUM_TARGETS], {"loss": loss, "accuracy": (better > worse).sum()}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Sums:
        """Without the reference: how often the model itself prefers what is better."""
        better, worse = log_likelihood(outputs, batch["targets"]).unbind(dim=1)
        return {"loss": -F.logsigmoid(better - worse).sum(), "accuracy": (better > worse).sum()}
