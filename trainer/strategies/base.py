"""The interface between the loop and a strategy: only calls that every strategy can answer.

A pipeline schedule runs forward and backward of all micro-batches, and DeepSpeed merges unscale, clip, step and zero.
So the loop's smallest calls are `train_step` and `update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.checkpoint.state import FlatShard
from trainer.models import ModelFactory
from trainer.objectives import Batch, Model, Objective, Rows, Sums
from trainer.strategies.forward_timer import ForwardTimer

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


class UpdateResult(NamedTuple):
    """What an update did; the tensors stay on the device until somebody reads them."""

    grad_norm: Tensor  # global norm before clipping, float32 scalar
    skipped: Tensor  # bool scalar: the step was left out
    bad: Tensor  # bool scalar: the norm reached the limit or is not a number, as in a step that a rank abandoned


class Strategy(Model, Protocol):
    objective: Objective
    timer: ForwardTimer

    def setup(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory | None) -> None:
        """Builds the model, parallelizes it, then builds the optimizer on the final parameters. Without an optimizer
        factory the model is not trained and stays in evaluation mode."""
        ...

    def train_step(
        self, micro_batches: Sequence[Batch], objective: Objective | None = None, abandoned: bool = False
    ) -> Sums:
        """Runs forward and backward of every micro-batch, without an update. Returns this rank's sums, on the device:
        counts and sums of the objective (None: the strategy's own). If any rank has `abandoned` the step, its update
        changes nothing on any rank."""
        ...

    def update(self, lr: float, limit: Tensor | float = math.inf) -> UpdateResult:
        """Unscales and clips the gradients, steps the optimizer and zeroes them. A step changes nothing if its gradient
        norm is not below `limit`, or if it has no target on any rank."""
        ...

    def eval_step(self, batch: Batch) -> tuple[Sums, Rows]:
        """Runs only the forward pass. Returns this rank's sums and rows of the strategy's own objective."""
        ...

    def accumulate(self, batch_sums: list[Sums], sums: Sums) -> list[Sums]:
        """Returns this rank's sums of the batches of an evaluation, with those of one more batch."""
        ...

    def reduce_batches(self, batch_sums: Sequence[Sums]) -> dict[str, float]:
        """Adds up what `accumulate` returned, over all data-parallel ranks."""
        ...

    def reduce(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Adds up vectors of one length over all data-parallel ranks: the one collective of metrics and votes."""
        ...

    def state(self, everything: bool = False) -> Mapping[str, Tensor | FlatShard]:
        """Returns what this rank holds, by canonical name: `model/<name>`, `optimizer/<kind>/<name>`, `scaler/<kind>`.
        `everything` includes weights that checkpoints leave out."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Loads other values for the tensors that `state` returned."""
        ...

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Streams every weight, whole, as CPU tensors on the main rank."""
        ...

    def close(self) -> None: ...
