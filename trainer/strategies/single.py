"""Training on one process."""

from __future__ import annotations

from torch import Tensor

from trainer.strategies.arithmetic import StepArithmetic


class Single(StepArithmetic):
    """Trains on one process, whose sums are already complete."""

    runs_alone = True

    def all_reduce(self, sums: Tensor) -> Tensor:
        return sums
