"""One process."""

from __future__ import annotations

from torch import Tensor

from trainer.strategies.arithmetic import StepArithmetic


class Single(StepArithmetic):
    """A step on one process: what it has is all there is."""

    runs_alone = True

    def all_reduce(self, sums: Tensor) -> Tensor:
        return sums
