"""The seam between the loop and a strategy: only verbs that every strategy can honor.

A pipeline schedule owns forward and backward of all micro-batches, DeepSpeed merges unscale, clip, step and zero; so
the loop says no less than `train_step` and `update`.
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
    """All stay on the device until somebody reads them."""

    grad_norm: Tensor  # global norm before clipping, float32 scalar
    skipped: Tensor  # bool scalar: the step was left out
    bad: Tensor  # bool scalar: the norm reached the limit or is not a number, as in a step that a rank abandoned


class Strategy(Model, Protocol):
    objective: Objective
    timer: ForwardTimer

    def setup(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory | None) -> None:
        """Builds the model, parallelizes it, then builds the optimizer on the final parameters; None for a model that
        is only asked, in evaluation mode."""
        ...

    def train_step(
        self, micro_batches: Sequence[Batch], objective: Objective | None = None, abandoned: bool = False
    ) -> Sums:
        """Forward and backward of every micro-batch, no update. Returns this rank's sums, on the device: what the
        objective (None: the strategy's own) counts and sums. Where one rank has `abandoned` the step, its update
        changes nothing on any."""
        ...

    def update(self, lr: float, limit: Tensor | float = math.inf) -> UpdateResult:
        """Unscale, clip, step, zero. A step whose gradient norm is not below `limit`, or that has no target on any
        process, changes nothing."""
        ...

    def eval_step(self, batch: Batch) -> tuple[Sums, Rows]:
        """Forward only; this rank's sums and rows, of the strategy's own objective."""
        ...

    def reduce(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Adds up vectors of one length over all data-parallel ranks: the one collective of metrics and votes."""
        ...

    def state(self, everything: bool = False) -> Mapping[str, Tensor | FlatShard]:
        """The canonical form: `model/<name>`, `optimizer/<kind>/<name>`, `scaler/<kind>` -> what this process holds.
        `everything`: also weights that checkpoints leave out."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave, filled with other values."""
        ...

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Streams every weight, whole, as CPU tensors on the main rank."""
        ...

    def close(self) -> None: ...
