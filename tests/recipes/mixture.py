"""A mixture of experts whose loss has two denominators: cross-entropy is a mean over targets, the router's z-loss (Zoph
et al. 2022, "ST-MoE", section 3.3) one over tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.models import WIDTH, Net
from trainer.config import Plugin
from trainer.facts import Facts
from trainer.objectives import NUM_TARGETS, Batch, Objective, Sums, Totals

EXPERTS, Z_LOSS, IGNORE = 3, 0.1, -100


class Mixture(Net):
    """`inputs` int64 [B, T] -> {"logits": [B, T, vocabulary], "router": [B, T, experts]}."""

    head_parts = ("head", "router", "experts")

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def project(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        router = self.router(x)
        shares = router.softmax(dim=-1)
        mixed = sum(shares[..., i, None] * expert(x).relu() for i, expert in enumerate(self.experts))
        return {"logits": self.head(x + mixed), "router": router}


class WithZLoss(Objective):
    class Config(Plugin):
        pass

    def counts(self, batch: Batch) -> dict[str, float]:
        return {NUM_TARGETS: int((batch["targets"] != IGNORE).sum()), "routed": batch["inputs"].numel()}

    def loss(self, outputs: dict[str, Tensor], batch: Batch, totals: Totals) -> tuple[Tensor, Sums]:
        logits, targets = outputs["logits"].flatten(0, 1), batch["targets"].flatten()
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        squares = (outputs["router"].logsumexp(dim=-1) ** 2).sum()
        loss = nats / totals[NUM_TARGETS] + Z_LOSS * squares / totals["routed"]
        return loss, {"loss": nats, "router_z": squares}

    def summary(self, sums, rows):  # type: ignore[no-untyped-def]
        return {"loss": sums["loss"] / sums[NUM_TARGETS], "router_z": sums["router_z"] / sums["routed"]}
