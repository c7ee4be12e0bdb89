"""Evaluation of a model on held-out data: one pass, summed over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objectives import Batch, Sums
from trainer.strategies.base import Strategy


class Evaluation:
    """Adds up batch after batch. All processes add the same number of batches."""

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self._sums, self._rows = list[Sums](), dict[str, list[Tensor]]()

    def add(self, batch: Batch) -> None:
        sums, rows = self.strategy.eval_step(batch)
        self._sums = self.strategy.accumulate(self._sums, sums)
        for name, value in rows.items():
            self._rows.setdefault(name, []).append(value)

    def end(self, gave_up: bool = False) -> dict[str, float] | None:
        """Returns what was measured, the same on every process; None where one of them `gave_up`."""
        totals = self.strategy.reduce_batches([*self._sums, {"gave_up": torch.tensor(float(gave_up))}])
        if totals.pop("gave_up") > 0:
            return None
        rows = {name: self.strategy.gather_rows(torch.cat(parts)).cpu() for name, parts in self._rows.items()}
        return self.strategy.objective.summary(totals, rows)
