"""A recorded step that is replayed on one process, and what each of its samples contributes."""

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

    def relative_difference(self, other: StepMetrics) -> StepMetrics:
        """Returns the relative differences."""
        return StepMetrics(*map(_difference, self, other))

    def agrees_with(self, other: StepMetrics) -> bool:
        loss, norm = self.relative_difference(other)
        return loss <= LOSS and norm <= NORM


class SampleMetrics(NamedTuple):
    """What a sample, or a document in it, contributes to the step."""

    loss: float
    """The mean over its targets."""
    targets: int
    grad_norm: float | None
    """The norm of its part of the step's gradient, at the step's scale. None if it was not measured."""


@dataclass(frozen=True)
class Sample:
    """An entry of the step's global batch: a packed sequence or a decoded sample."""

    number: int
    """Its number in the run, from 0 on."""
    source: str
    entry: Any
    """Its entry in the ledger: [shard, key], or a list of spans."""
    row: Batch
    """Tensors [1, ...]."""

    @property
    def spans(self) -> list[Span]:
        """Returns the documents in a packed sequence; none for a decoded sample."""
        return self.entry if isinstance(self.entry[0], Span) else []


@dataclass
class Replay:
    """The run as it was before step `data.step`, on this process."""

    config: Config
    tokenizer: Tokenizer
    strategy: StepArithmetic
    data: StepData
    samples: list[Sample]
    checkpoint: FoundCheckpoint | None
    """The checkpoint that the replay began with; None for the initial weights."""
    recorded: StepMetrics
    in_ledger: bool | None
    """Whether the run's ledger names these samples; None if it has no entry of the step."""
    differs_since: int | None
    """The first replayed step before this one that differs from the record."""
    devices: tuple[str, str]
    """The devices of the run and of this process."""
    size: int
    """Sequences of a forward pass."""

    @property
    def start(self) -> int:
        """Returns the step of the checkpoint."""
        return self.checkpoint.manifest["step"] if self.checkpoint else 0

    @cached_property
    def numbers(self) -> StepMetrics:
        """Returns loss and gradient norm of the step, as its run computed them."""
        return self._measure(self.data.micro_batches)

    @cached_property
    def targets(self) -> int:
        return int(sum(self.objective.counts(batch)[NUM_TARGETS] for batch in self.data.micro_batches))

    @property
    def objective(self) -> Objective:
        return self.strategy.objective

    def measure_part(self, row: Batch, *, gradient: bool) -> SampleMetrics:
        """Measures what the row contributes to the step."""
        totals, _ = self.strategy.reduce_counts(self.data.micro_batches, self.objective)
        with torch.set_grad_enabled(gradient), preserve_buffers(self.strategy.model):
            loss, sums = self.strategy.forward(row, self.objective, totals)
        norm = None
        if gradient:
            self.strategy.backward(loss * self.strategy.loss_scale, last=True)
            norm = float(self.strategy.discard())
        counts = self.objective.counts(row)
        return SampleMetrics(loss_of(self.objective, {**counts, **sums}), int(counts[NUM_TARGETS]), norm)

    def measure_step(self, rows: Sequence[Batch]) -> StepMetrics:
        """Measures a step of these rows alone."""
        groups = [rows[i : i + self.size] for i in range(0, len(rows), self.size)]
        batches = [{name: torch.cat([row[name] for row in group]) for name in group[0]} for group in groups]
        return self._measure(batches)

    def text(self, sample: Sample) -> str | None:
        """Returns the text of a sample that the model sees, None if it is not text."""
        if not self.config.data.has_text or prepares(self.objective):  # its examples may be anything
            return None
        ids = sample.row["inputs"][0].tolist()
        return self.tokenizer.decode(ids[: sum(span.end_token - span.first_token for span in sample.spans) or None])

    def _measure(self, micro_batches: Sequence[Batch]) -> StepMetrics:
        with preserve_buffers(self.strategy.model):
            sums = self.strategy.train_step(micro_batches)
        return StepMetrics(loss_of(self.objective, sums), float(self.strategy.discard()))


def loss_of(objective: Objective, sums: Mapping[str, Any]) -> float:
    return objective.means({name: float(torch.as_tensor(value).detach()) for name, value in sums.items()})["loss"]


def _difference(value: float, reference: float) -> float:
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf if math.isfinite(value) or math.isfinite(reference) else 0.0
    return abs(value - reference) / (abs(reference) or 1.0)
