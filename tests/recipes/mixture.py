"""A mixture of experts. Its loss has two denominators: cross-entropy is a mean over targets, the router's z-loss (Zoph
et al. 2022, "ST-MoE", section 3.3) one over tokens. Its load is balanced without a loss, by biases that follow the sums
of the whole step (Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.models import WIDTH, Net
from trainer.config import Plugin
from trainer.facts import Facts
from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Sums

EXPERTS, Z_LOSS, SPEED, IGNORE = 3, 0.1, 0.01, -100


class Router(nn.Linear):
    """Scores of the experts, and which is chosen for a token: one-hot [..., experts]."""

    def __init__(self) -> None:
        super().__init__(WIDTH, EXPERTS, bias=False)
        self.register_buffer("favor", torch.zeros(EXPERTS))
        self.register_buffer("load", torch.zeros(EXPERTS), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        chosen = F.one_hot((scores + self.favor).argmax(dim=-1), EXPERTS)
        if self.training:
            self.load += chosen.sum(dim=(0, 1))
        return scores, chosen


class Mixture(Net):
    """`inputs` int64 [B, T] -> {"logits": [B, T, vocabulary], "router": [B, T, experts]}."""

    head_parts = ("head", "router", "experts")
    statistics = ("router.load",)

    def __init__(self, config: Net.Config, facts: Facts):
        super().__init__(config, facts)
        self.router = Router()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def project(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        router, chosen = self.router(x)
        shares = router.softmax(dim=-1) * (0.5 + 0.5 * chosen)
        mixed = sum(shares[..., i, None] * expert(x).relu() for i, expert in enumerate(self.experts))
        return {"logits": self.head(x + mixed), "router": router}

    def after_update(self, sums: dict[str, Tensor]) -> None:
        load = sums["router.load"]
        self.router.favor += SPEED * (load.mean() - load).sign().to(self.router.favor.dtype)


class WithZLoss(Objective):
    class Config(Plugin):
        pass

    def counts(self, batch: Batch) -> dict[str, float]:
        return {NUM_TARGETS: int((batch["targets"] != IGNORE).sum()), "routed": batch["inputs"].numel()}

    def loss(self, outputs: dict[str, Tensor], batch: Batch, totals: Normalizers) -> tuple[Tensor, Sums]:
        logits, targets = outputs["logits"].flatten(0, 1), batch["targets"].flatten()
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        squares = (outputs["router"].logsumexp(dim=-1) ** 2).sum()
        loss = nats / totals[NUM_TARGETS] + Z_LOSS * squares / totals["routed"]
        return loss, {"loss": nats, "router_z": squares}

    def summary(self, sums, rows):  # type: ignore[no-untyped-def]
        return {"loss": sums["loss"] / sums[NUM_TARGETS], "router_z": sums["router_z"] / sums["routed"]}
