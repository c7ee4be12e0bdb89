"""Leafwise pipelines: a leaf is a micro-batch of the pipeline, whatever the schedule and the number of stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config.pipeline_schedules import micro_batches as pipeline_micro_batches
from trainer.errors import ConfigError
from trainer.models import ModelFactory
from trainer.objectives import Batch, Normalizers, Objective, Sums
from trainer.strategies.arithmetic import to_device
from trainer.strategies.leafwise.arithmetic import GradientShards, LeafwiseArithmetic
from trainer.strategies.leafwise.leaves import LeafGradients, fill_missing, take_gradients
from trainer.strategies.padding import num_rows, take_rows
from trainer.strategies.pipeline import NumberedStage, Pipeline
from trainer.strategies.stages import Stage


class LeafStage(NumberedStage):
    """A stage that tells its module when the backward pass of a micro-batch has ended."""

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if full_backward:
            self.submod.end_backward(bwd_chunk_id)  # type: ignore[operator, union-attr]

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.submod.end_backward(bwd_chunk_id)  # type: ignore[operator, union-attr]


class TiedGradients:
    """The gradients of weights that the two ends of the model share. A leaf's is the sum of the two ends', before
    anything is added up over leaves.

    `num_uses`: how many of this rank's stages use them. `ends`: the group of the ranks that have the ends, None if this
    one has both.
    """

    def __init__(self, gradients: LeafGradients, num_uses: int, ends: dist.ProcessGroup | None):
        self.gradients, self.num_uses, self.ends = gradients, num_uses, ends
        self.uses: dict[int, list[list[Tensor | None]]] = {}

    def take(self, leaf: int, parameters: Sequence[nn.Parameter]) -> None:
        """Takes what the backward pass of one stage has added to the gradients of a leaf."""
        uses = self.uses.setdefault(leaf, [])
        uses.append(take_gradients(parameters))
        if len(uses) == self.num_uses and self.ends is None:
            self.gradients.tree.add((leaf, leaf + 1), _add_uses(self.uses.pop(leaf)))

    @torch.no_grad()
    def exchange(self) -> None:
        """Adds up the two ends of the leaves since the last exchange, if they are on two ranks."""
        if self.ends is None:
            return
        sums, waits = {}, []
        for leaf in sorted(self.uses):
            (values,) = self.uses.pop(leaf)
            sums[leaf] = fill_missing(values, self.gradients.parameters())
            waits += [dist.all_reduce(value, group=self.ends, async_op=True) for value in sums[leaf]]
        for wait in waits:
            wait.wait()
        for leaf, present in sums.items():
            self.gradients.tree.add((leaf, leaf + 1), present)


class LeafwisePipeline(LeafwiseArithmetic, Pipeline):
    stage_class = LeafStage
    has_checked_generator = False

    def build(self, model_factory: ModelFactory) -> nn.Module:
        model = super().build(model_factory)
        group = self.replica_mesh.get_group() if self.topology.dp_size > 1 else None
        tied = {
            id(self.local_parameters[name]): i for i, name in enumerate(self.all_tied) if name in self.local_parameters
        }
        self.untied_names: dict[int, list[str]] = {}
        self.tied_names: dict[int, list[str]] = {}
        for index, stage in self.stages.items():
            trained = [(name, value) for name, value in stage.named_parameters() if value.requires_grad]
            self.untied_names[index] = [name for name, value in trained if id(value) not in tied]
            tied_names = {tied[id(value)]: name for name, value in trained if id(value) in tied}
            self.tied_names[index] = [tied_names[i] for i in sorted(tied_names)]  # in one order for both ends
            stage.end_backward = partial(self._end_backward, index)  # type: ignore[assignment]
        device = self.topology.device
        self.gradients = {
            index: LeafGradients(partial(_parameters, stage, self.untied_names[index]), self.leaves, group, device)
            for index, stage in self.stages.items()
        }
        users = [index for index, names in self.tied_names.items() if names]
        self.tied_gradients = None
        if users:
            parameters = partial(_parameters, self.stages[users[0]], self.tied_names[users[0]])
            summed = LeafGradients(parameters, self.leaves, group, device)
            self.tied_gradients = TiedGradients(summed, len(users), self.ends)
        return model

    def run_leaves(
        self, micro_batches: Sequence[Batch], objective: Objective, normalizers: Normalizers, leaf_sums: list[Sums]
    ) -> None:
        summed = [*self.gradients.values(), *([self.tied_gradients.gradients] if self.tied_gradients else [])]
        for gradients in summed:
            gradients.begin()
        count = pipeline_micro_batches(self.config, self.topology.layout.stages, len(micro_batches))
        size = max(self.options.micro_batch, *self._max_rows(micro_batches))
        for first in range(0, len(micro_batches), count):
            self.leaves.number = first
            self._run_together(
                micro_batches[first : first + count], count, size, objective, normalizers, leaf_sums[first:]
            )
            if self.tied_gradients:
                self.tied_gradients.exchange()
        for sums in leaf_sums:
            self._add_missing_sums(sums, ("loss", objective))
        for gradients in summed:
            gradients.finish()

    def _run_together(
        self,
        batches: Sequence[Batch],
        count: int,
        size: int,
        objective: Objective,
        normalizers: Normalizers,
        sums: list[Sums],
    ) -> None:
        """Runs leaves of `size` rows that are under way together, and empty ones up to the `count` that the schedule
        needs."""
        empty = {name: value[:0] for name, value in batches[0].items()}
        filled = [*batches, *[empty] * (count - len(batches))]
        row_counts = [num_rows(batch) for batch in filled]
        spare = self.padding_row() if min(row_counts) < size else None
        chunks = [to_device(take_rows(batch, 0, size, spare), self.topology.device) for batch in filled]

        def add(number: int, micro_sums: Sums) -> None:
            if number < len(batches):
                self.add(sums[number], micro_sums)

        self._seed(batches[0])
        before = None if self.has_checked_generator else self._generator_state()
        self.run_chunks(chunks, row_counts, objective, normalizers, add)
        if before is not None and not torch.equal(before, self._generator_state()):
            raise ConfigError(
                f"train.deterministic=topology: {type(self.model).__name__} draws from torch's generator, in another "
                "order in each stage of a pipeline; set its dropout to 0, or take another strategy; nearest: "
                "strategy=fsdp"
            )
        self.has_checked_generator = True

    def _end_backward(self, stage: int, chunk: int) -> None:
        number = self.leaves.number + chunk
        tied = _parameters(self.stages[stage], self.tied_names[stage])
        if number >= self.leaves.local_count:  # it is no leaf, only padding of the schedule
            take_gradients([*self.gradients[stage].parameters(), *tied])
            return
        leaf = self.leaves.local[number]
        self.gradients[stage].take(leaf)
        if tied and self.tied_gradients:
            self.tied_gradients.take(leaf, tied)

    def gradient_shards(self) -> GradientShards:
        counted_elsewhere = set(self.tied) if 0 not in self.stages else set()
        sizes = {name: shape.numel() for name, shape, _ in self.names}
        tensors = [
            self.local_gradient(None if name in counted_elsewhere else self.local_parameters.get(name))
            for name in self.trained
        ]
        group = dist.group.WORLD if self.is_sharded else self.group
        return GradientShards(tensors, [sizes[name] for name in self.trained], group)

    def _generator_state(self) -> Tensor:
        if self.topology.device.type == "cuda":
            return torch.cuda.get_rng_state(self.topology.device)
        return torch.get_rng_state()


def _parameters(stage: Stage, names: Sequence[str]) -> list[nn.Parameter]:
    return [stage.get_parameter(name) for name in names]


def _add_uses(uses: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    first, *others = uses
    summed = list(first)
    for values in others:
        summed = [b if a is None else a if b is None else a + b for a, b in zip(summed, values, strict=True)]
    return summed
