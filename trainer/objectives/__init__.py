"""Objectives: the user's side of a step.

An objective may do anything that ends in gradients of sums over rows: the loss of a batch is a sum over its rows, or
targets, divided by totals of the whole step. So the curve does not depend on how rows are spread over ranks and
micro-batches. Anything that is not such a sum (a loss over the global batch, through another model, of a rollout) is
computed first, without a graph, and passed to each micro-batch as a field: see `Objective.updates`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.facts import Facts

Batch = dict[str, Tensor]  # tensors [B, ...] by name; always `draws`, int64 [B]: 63 random bits a row
Outputs = Any  # of a model: a tensor [B, ...], or a dict of tensors
Normalizers = Mapping[str, Tensor]  # float64 scalars on the device
Rows = dict[str, Tensor]  # [B, ...], numbers of each row
Sums = dict[str, Tensor]  # scalars that add up over micro-batches and processes

NUM_TARGETS = "num_targets"


class Model(Protocol):
    """The methods of a model that `Objective.updates` may call. All ranks must call the same ones."""

    def infer(self, batch: Batch) -> Outputs:
        """Returns the outputs for a micro-batch, without a graph, on every rank. A training pass of the same rows has
        the same outputs, because it draws the same random numbers."""
        ...

    def gradient(self, batch: Batch, field: str, loss: Callable[[Outputs, Batch], Tensor]) -> Tensor:
        """Returns the gradient of a loss of the outputs for a micro-batch with respect to one of its fields; no
        parameter gets a gradient. Raises ConfigError under strategy=pipeline."""
        ...

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Returns the rows of all ranks in the run's order: the same matrix on any topology, except that rows after a
        quarantined one (`data.on_error=quarantine`) may be in another order. `rows` are [n, ...], this rank's rows of
        all micro-batches of a step."""
        ...

    def local_rows(self, rows: Tensor, count: int) -> Tensor:
        """Returns this rank's `count` rows of those that `gather_rows` returned."""
        ...


def prepares(objective: Objective) -> bool:
    """Returns whether the objective converts rows of the data to examples, rather than taking them as they are."""
    return overrides(objective, "example")


def has_rows(objective: Objective) -> bool:
    """Returns whether an evaluation gathers numbers for each row."""
    return overrides(objective, "rows")


def overrides(objective: Objective, method: str) -> bool:
    """Returns whether the objective's class overrides the method."""
    default = getattr(Objective, method)
    return getattr(objective.__class__, method, default) is not default


class Update(NamedTuple):
    """One update of one model: the batches it learns from, and the objective that it learns. Create another objective
    than the run's only once: a strategy remembers facts, such as the names of its sums, per object."""

    batches: Sequence[Batch]
    objective: Objective
    model: str = "model"


class Objective:
    """The base class of objectives. A subclass defines `loss`, and usually `counts`; everything else has defaults.

    It is built from its `Config` and the `Facts` of the run.
    """

    continues_text = False
    """Whether its models continue a text, so that samples are drawn from a finished run."""
    trained: Sequence[str] = ()
    """Names of models that `updates` trains besides the run's; `models.trained` defines them."""
    frozen: Sequence[str] = ()
    """Names of frozen models that `updates` calls; `models.frozen` names the runs that they come from."""

    def __init__(self, config: Any, facts: Facts):
        self.config, self.facts = config, facts

    def example(self, row: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        """Returns the example that the model learns from for a row of the data (tensors by name, without a batch
        dimension): masked, paired or padded, with the same shapes for all rows. It is called in the reading threads,
        must depend only on its arguments, and must not change `row`. `draw` is 63 random bits, which differ by row and
        epoch; in an evaluation they are always the same."""
        return row

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns numbers of a batch that add up and are known before the forward pass; `batch` is on the CPU.
        `num_targets` is always among them: a step without any changes nothing, and their sum is the run's `tokens`."""
        return {NUM_TARGETS: len(batch["draws"])}

    def loss(self, outputs: Outputs, batch: Batch, normalizers: Normalizers) -> tuple[Tensor, Sums]:
        """Returns this batch's share of the step's loss, a scalar with its graph, and sums to record.

        `normalizers` are the `counts` of the whole step, over all ranks, as float64 scalars; zeros are replaced by
        ones, so that it is safe to divide by them. The shares of all batches add up to the loss.
        """
        raise NotImplementedError

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """Returns the sums of a batch of held-out data that `summary` needs; by default those of `loss`, which then
        must not read fields that `updates` adds: an evaluation does not have them."""
        one = torch.ones((), dtype=torch.float64, device=batch["draws"].device)
        return self.loss(outputs, batch, defaultdict(lambda: one))[1]

    def rows(self, outputs: Outputs, batch: Batch) -> Rows:
        """Returns numbers of each row, [B, ...] by name, for metrics of an evaluation that are not sums: ranks, F1,
        correlations. `summary` gets those of all held-out rows, in the same order on any topology."""
        return {}

    def summary(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the metrics of a step or an evaluation, by name; `loss` is among them. `sums` are those of `loss`, or
        of `evaluate`, and the counts. By default each is divided by the number of targets. `rows` are the results of
        the method `rows` for the whole evaluation, on the CPU; they are empty in a training step."""
        targets = sums[NUM_TARGETS]
        return {name: value / targets if targets else math.nan for name, value in sums.items() if name != NUM_TARGETS}

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the `summary` of a training step; without any target its loss is zero."""
        return self.summary(sums, {}) if sums[NUM_TARGETS] else {"loss": 0.0}

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        """Yields the updates of a step; each is done before the next is requested. By default there is one.

        `batches` are this rank's micro-batches, on the CPU. Anything that is not a sum over rows is computed here, by
        calling `models["model"]`, and passed on as a field of the yielded batches."""
        yield Update(batches, self)
