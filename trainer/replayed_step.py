"""A recorded step that is done again on one process: what each of its samples is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from trainer.checkpoint.load import FoundCheckpoint
from trainer.config import Config
from trainer.data.packing import Span
from trainer.data.stream import StepData
from trainer.data.tokenizer import Tokenizer
from trainer.objectives import NUM_TARGETS, Batch, Objective, prepares
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.buffers import preserve_buffers

LOSS, NORM = 1e-5, 1e-4  # how far apart two fp32 curves of one run may be, relative


class StepMetrics(NamedTuple):
    """Loss and gradient norm of a step, not finite where the run recorded null."""

    loss: float
    grad_norm: float

    def apart(self, other: StepMetrics) -> StepMetrics:
        """Relative differences."""
        return StepMetrics(*map(_difference, self, other))

    def same(self, other: StepMetrics) -> bool:
        loss, norm = self.apart(other)
        return loss <= LOSS and norm <= NORM


class SampleMetrics(NamedTuple):
    """What a sample, or a document in it, is in the step."""

    loss: float
    """Mean over its targets."""
    targets: int
    grad_norm: float | None
    """Norm of its part of the step's gradient, at the step's scale. None if it was not asked for."""


@dataclass(frozen=True)
class Sample:
    """A place in the step's global batch: a packed sequence or a decoded sample."""

    number: int
    """In the run, from 0 on."""
    source: str
    entry: Any
    """The ledger's name for it: [shard, key], or a list of spans."""
    row: Batch
    """Tensors [1, ...]."""

    @property
    def pieces(self) -> list[Span]:
        """The documents in a packed sequence; none of a decoded sample."""
        return self.entry if isinstance(self.entry[0], Span) else []


@dataclass
class Replay:
    """The run as it was before step `data.step`, on this process."""

    config: Config
    tokenizer: Tokenizer
    strategy: StepArithmetic
    data: StepData
    samples: list[Sample]
    found: FoundCheckpoint | None
    """The checkpoint that was taken; None for the initial weights."""
    recorded: StepMetrics
    in_ledger: bool | None
    """Whether the run's ledger names these samples; None if it keeps none."""
    apart_since: int | None
    """The first step on the way here that is not as recorded."""
    devices: tuple[str, str]
    """The device of the run, and of this process."""
    size: int
    """Sequences of a forward pass."""

    @property
    def start(self) -> int:
        """The step of the checkpoint."""
        return self.found.manifest["step"] if self.found else 0

    @cached_property
    def numbers(self) -> StepMetrics:
        """Loss and gradient norm of the step, as its run had them."""
        return self._measured(self.data.micro_batches)

    @cached_property
    def targets(self) -> int:
        return int(sum(self.objective.counts(batch)[NUM_TARGETS] for batch in self.data.micro_batches))

    @property
    def objective(self) -> Objective:
        return self.strategy.objective

    def part(self, row: Batch, *, gradient: bool) -> SampleMetrics:
        """What the row is in the step."""
        totals, _ = self.strategy.reduce_counts(self.data.micro_batches, self.objective)
        with torch.set_grad_enabled(gradient), preserve_buffers(self.strategy.model):
            loss, sums = self.strategy.forward(row, self.objective, totals)
        norm = None
        if gradient:
            self.strategy.backward(loss * self.strategy.loss_scale, last=True)
            norm = float(self.strategy.discard())
        counts = self.objective.counts(row)
        return SampleMetrics(loss_of(self.objective, {**counts, **sums}), int(counts[NUM_TARGETS]), norm)

    def of(self, rows: Sequence[Batch]) -> StepMetrics:
        """A step of these rows alone."""
        groups = [rows[i : i + self.size] for i in range(0, len(rows), self.size)]
        batches = [{name: torch.cat([row[name] for row in group]) for name in group[0]} for group in groups]
        return self._measured(batches)

    def text(self, sample: Sample) -> str | None:
        """What the model is given of it, None if that is not text."""
        if not self.config.data.has_text or prepares(self.objective):  # whose examples may be anything
            return None
        ids = sample.row["inputs"][0].tolist()
        return self.tokenizer.decode(ids[: sum(piece.end_token - piece.first_token for piece in sample.pieces) or None])

    def _measured(self, micro_batches: Sequence[Batch]) -> StepMetrics:
        with preserve_buffers(self.strategy.model):
            sums = self.strategy.train_step(micro_batches)
        return StepMetrics(loss_of(self.objective, sums), float(self.strategy.discard()))


def loss_of(objective: Objective, sums: Mapping[str, Any]) -> float:
    return objective.means({name: float(torch.as_tensor(value).detach()) for name, value in sums.items()})["loss"]


def _difference(here: float, there: float) -> float:
    if not (math.isfinite(here) and math.isfinite(there)):
        return math.inf if math.isfinite(here) or math.isfinite(there) else 0.0
    return abs(here - there) / (abs(there) or 1.0)
