"""Objectives: the user's side of a step.

An objective may do anything that ends in gradients of sums over rows: the loss of a batch is a sum over its rows, or
targets, divided by totals of the whole step. So one curve comes out, however the rows are dealt to processes and
micro-batches. What is not such a sum (a loss over the global batch, through another model, of a rollout) is computed
first, without a graph, and given to each micro-batch as a field: see `Objective.updates`.
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
Outputs = Any  # of a model: a tensor [B, ...], or a dict of them
Normalizers = Mapping[str, Tensor]  # float64 scalars on the device
Rows = dict[str, Tensor]  # [B, ...], numbers of each row
Sums = dict[str, Tensor]  # scalars that add up over micro-batches and processes

NUM_TARGETS = "num_targets"


class Model(Protocol):
    """What `Objective.updates` may ask of a model of the run. All processes must ask for the same."""

    def infer(self, batch: Batch) -> Outputs:
        """Returns the outputs for a micro-batch, without a graph, on every process: those of the training pass of the
        same rows, which draws the same numbers."""
        ...

    def gradient(self, batch: Batch, field: str, loss: Callable[[Outputs, Batch], Tensor]) -> Tensor:
        """Returns the gradient of a loss of the outputs for a micro-batch with respect to one of its fields; no
        parameter gets one. Raises ConfigError under strategy=pipeline."""
        ...

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Returns the rows of all processes in the run's order: the same matrix on any topology, but where a row was
        left out (`data.on_error=quarantine`): those behind it may be in another order. `rows`: [n, ...], this process's
        share of a step, of all its micro-batches."""
        ...

    def local_rows(self, rows: Tensor, count: int) -> Tensor:
        """Returns this process's `count` rows of what `gather_rows` returned."""
        ...


def prepares(objective: Objective) -> bool:
    """Returns whether the objective makes examples of the data's rows, rather than taking these as they are."""
    return overrides(objective, "example")


def has_rows(objective: Objective) -> bool:
    """Returns whether an evaluation gathers numbers of each row."""
    return overrides(objective, "rows")


def overrides(objective: Objective, method: str) -> bool:
    """Returns whether the objective's class has a method of its own."""
    default = getattr(Objective, method)
    return getattr(objective.__class__, method, default) is not default


class Update(NamedTuple):
    """One update of one model: the batches it learns from, and what it learns. Another objective than the run's is made
    once, with it: what is known of one, such as the names of its sums, is known for the object."""

    batches: Sequence[Batch]
    objective: Objective
    model: str = "model"


class Objective:
    """What is learned. A subclass has `loss`, most have `counts`; the rest has defaults.

    It is made of its `Config` and what is known of the run.
    """

    continues_text = False
    """Whether its models continue a text, so that a finished run is sampled from."""
    trained: Sequence[str] = ()
    """Names of models that `updates` trains beside the run's; `models.trained` says what they are."""
    frozen: Sequence[str] = ()
    """Names of frozen models that `updates` asks; `models.frozen` says of which runs they are."""

    def __init__(self, config: Any, facts: Facts):
        self.config, self.facts = config, facts

    def example(self, row: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
        """Returns what the model learns from a row of the data (tensors by name, without a batch dimension): masked,
        paired or padded, all rows alike. It is called in the threads that read, must depend on nothing but its
        arguments, and does not change `row`. `draw`: 63 random bits, the row's own in each epoch; in an evaluation
        they are always the same."""
        return row

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns numbers of a batch that add up and are known before the forward pass; `batch` is on the CPU.
        `num_targets` is always among them: a step without any changes nothing, and the run's `tokens` are its sum."""
        return {NUM_TARGETS: len(batch["draws"])}

    def loss(self, outputs: Outputs, batch: Batch, normalizers: Normalizers) -> tuple[Tensor, Sums]:
        """Returns this batch's share of the step's loss, a scalar with its graph, and sums to record.

        `normalizers` are the `counts` of the whole step, over all processes, as float64 scalars; what was zero is one,
        so that anything may be divided by them. The shares of all batches add up to the loss.
        """
        raise NotImplementedError

    def evaluate(self, outputs: Outputs, batch: Batch) -> Sums:
        """Returns the sums of a batch of held-out data that `summary` needs; those of `loss`, by default,
        which then may read no field that `updates` added: an evaluation has none."""
        one = torch.ones((), dtype=torch.float64, device=batch["draws"].device)
        return self.loss(outputs, batch, defaultdict(lambda: one))[1]

    def rows(self, outputs: Outputs, batch: Batch) -> Rows:
        """Returns what an evaluation needs of each row, [B, ...] by name, for measures that are not sums: ranks, F1,
        correlations. `summary` is given those of all held-out rows, in their order on any topology."""
        return {}

    def summary(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns what the sums of a step, or of an evaluation, mean to a person, by name; `loss` is among them. `sums`
        are those of `loss`, or of `evaluate`, and the counts. By default each is divided by the number of targets.
        `rows`: those of `rows`, of the whole evaluation, on the CPU; none of a training step."""
        targets = sums[NUM_TARGETS]
        return {name: value / targets if targets else math.nan for name, value in sums.items() if name != NUM_TARGETS}

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the `summary` of a training step, which may be without any target: then it has no loss either."""
        return self.summary(sums, {}) if sums[NUM_TARGETS] else {"loss": 0.0}

    def updates(self, batches: Sequence[Batch], models: Mapping[str, Model]) -> Iterator[Update]:
        """Yields what a step consists of; each update is done before the next is asked for. By default there is one.

        `batches` are this process's micro-batches, on the CPU. What is not a sum over rows is computed here, by asking
        `models["model"]`, and handed on as a field of the batches that are yielded."""
        yield Update(batches, self)
