"""Leafwise strategies whose ranks have the whole model: single and ddp."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from trainer.objectives import Batch, Normalizers, Objective, Sums
from trainer.strategies.leafwise.arithmetic import LeafwiseArithmetic
from trainer.strategies.leafwise.leaves import LeafGradients


class LeafwiseReplicas(LeafwiseArithmetic):
    """The whole model on every rank. Gradients are exchanged after the last backward pass of a step."""

    def wrap(self, model: nn.Module) -> nn.Module:
        group = dist.group.WORLD if self.topology.world_size > 1 else None
        self.gradients = LeafGradients(lambda: self.parameters, self.leaves, group, self.topology.device)
        return model

    def run_leaves(
        self, micro_batches: Sequence[Batch], objective: Objective, normalizers: Normalizers, leaf_sums: list[Sums]
    ) -> None:
        self.gradients.begin()
        super().run_leaves(micro_batches, objective, normalizers, leaf_sums)
        self.gradients.finish()

    def end_leaf(self) -> None:
        self.gradients.take(self.leaves.local[self.leaves.number])
