"""The arithmetic of a step whose sums have the same bits on any topology."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import fault_points
from trainer.errors import ConfigError
from trainer.models import ModelFactory
from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Sums
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.base import OptimizerFactory
from trainer.strategies.leafwise.exact_sums import sums_of_squares
from trainer.strategies.leafwise.leaves import Leaves
from trainer.strategies.tensor_parallel import local_tensor


class LeafwiseArithmetic(StepArithmetic):
    """The base of a strategy's leafwise class, in front of the strategy's own: a micro-batch is a leaf."""

    runs_alone = True
    has_checked_buffers = False

    def setup(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory | None) -> None:
        self.leaves = Leaves(self.options.deal, self.topology.dp_rank, self.topology.dp_size)
        super().setup(model_factory, optimizer_factory)
        self.num_averaged_ranks = 1  # gradients are summed

    def all_reduce(self, sums: Tensor) -> Tensor:
        return sums if self.topology.world_size == 1 else super().all_reduce(sums)

    def train_step(
        self, micro_batches: Sequence[Batch], objective: Objective | None = None, abandoned: bool = False
    ) -> Sums:
        objective = objective or self.objective
        self.leaves.begin(len(micro_batches))
        normalizers, leaf_sums = self.reduce_leaf_counts(micro_batches, objective, abandoned)
        self.buffers.snapshot()
        self.run_leaves(micro_batches, objective, normalizers, leaf_sums)
        self._check_buffers()
        names = list(leaf_sums[0])
        totals = self._sum_over_leaves([[sums[name] for name in names] for sums in leaf_sums])
        # All ranks have the totals, and the loop adds up what ranks report: only one does.
        return dict(zip(names, (totals if self.topology.is_main else torch.zeros_like(totals)).unbind(), strict=True))

    def run_leaves(
        self, micro_batches: Sequence[Batch], objective: Objective, normalizers: Normalizers, leaf_sums: list[Sums]
    ) -> None:
        """Runs forward and backward of this rank's leaves, adds what they sum to `leaf_sums`, and gives the parameters
        their gradients."""
        for number, batch in enumerate(micro_batches):
            self.leaves.number = number
            with self.sync(last=self.leaves.is_last):
                loss, micro_sums = self.forward(batch, objective, normalizers)
                fault_points.point("step.loss", [loss])
                self.backward(loss * self.loss_scale, self.leaves.is_last)
            self.end_leaf()
            self.add(leaf_sums[number], micro_sums)

    def end_leaf(self) -> None:
        """Takes the gradients of the leaf whose backward pass has ended."""

    def reduce_leaf_counts(
        self, micro_batches: Sequence[Batch], objective: Objective, abandoned: bool
    ) -> tuple[Normalizers, list[Sums]]:
        """Returns the counts of the whole step, as `reduce_counts`, and those of each of this rank's leaves."""
        counts = [objective.counts(batch) for batch in micro_batches]
        names, device = list(counts[0]), self.topology.device
        local = torch.tensor([[float(of_leaf[name]) for name in names] for of_leaf in counts], dtype=torch.float64)
        local = local.to(device)
        reported = local if self.topology.is_data_rank else torch.zeros_like(local)
        summed = self._sum_over_leaves(list(reported * math.nan if abandoned else reported))
        self.num_targets = summed[names.index(NUM_TARGETS)]
        leaf_sums = [Sums() for _ in counts]
        for sums, values in zip(leaf_sums, local, strict=True):
            self.add(sums, dict(zip(names, values.unbind(), strict=True)))
        return dict(zip(names, torch.where(summed == 0, 1.0, summed).unbind(), strict=True)), leaf_sums

    def _sum_over_leaves(self, local: Sequence[Tensor | Sequence[Tensor]]) -> Tensor:
        """Returns the sums over all leaves of vectors, fp64 [names], of which this rank has those of its leaves: each
        goes to the place of its leaf, to which all others add zeros, so that every rank adds up the same matrix."""
        rows = torch.stack([row if isinstance(row, Tensor) else torch.stack(list(row)) for row in local])
        places = rows.new_zeros((self.leaves.count, rows.shape[1]))
        places[self.leaves.local] = rows
        return self.all_reduce(places).sum(0)

    def total(self, batch_sums: Sequence[Sums]) -> dict[str, float]:
        """Adds up exactly: the batches of an evaluation are the same wherever they are computed, their order is not."""
        device, replicas = self.topology.device, self.topology.dp_size
        places = {
            name: torch.zeros((len(batch_sums), replicas), dtype=torch.float64, device=device)
            for name in dict.fromkeys(name for sums in batch_sums for name in sums)
        }
        for number, sums in enumerate(batch_sums):
            for name, value in sums.items():
                places[name][number, self.topology.dp_rank] = value
        totals = self.reduce({name: values.reshape(-1) for name, values in places.items()})
        return {name: _exact_sum(values) for name, values in totals.items()}

    def num_padded(self, rows: int) -> int:
        """Pads every leaf to its full size: kernels may add up otherwise for other shapes."""
        return max(rows, self.options.micro_batch)

    def row_order(self, row_counts: Sequence[int]) -> Tensor:
        deal, size, replicas = self.options.deal, sum(row_counts), len(row_counts)
        numbers = [deal.rows(size, replica, replicas) for replica in range(replicas)]
        if [len(rows) for rows in numbers] != list(row_counts):  # some are quarantined, nobody knows which
            numbers = [deal.rows(replicas * max(row_counts), replica, replicas) for replica in range(replicas)]
        return torch.cat([torch.from_numpy(rows[:n]) for rows, n in zip(numbers, row_counts, strict=True)]).argsort()

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        local, sizes, group = self.norm_parts()
        squares = sums_of_squares(
            local, sizes, self.topology.device, _reduce(group, dist.ReduceOp.MAX), _reduce(group, dist.ReduceOp.SUM)
        )
        return squares.sum().sqrt().float()

    def norm_parts(self) -> tuple[list[Tensor], list[int], dist.ProcessGroup | None]:
        """Returns what this rank has of the gradient of each trained parameter of the model (numel 0 if nothing), which
        no other rank of the group counts, their whole sizes, and the group of ranks that have the others."""
        return [self.local_gradient(parameter) for parameter in self.parameters], self.sizes(), None

    def sizes(self) -> list[int]:
        """Returns the elements of each whole parameter."""
        return [parameter.numel() for parameter in self.parameters]

    def local_gradient(self, parameter: nn.Parameter | None) -> Tensor:
        if parameter is None or parameter.grad is None:
            return torch.empty(0, device=self.topology.device)
        return local_tensor(parameter.grad)

    def _check_buffers(self) -> None:
        """Raises ConfigError for a model whose forward passes change its buffers, as batch norm does: each replica
        changes them by its own rows."""
        if self.has_checked_buffers:
            return
        self.has_checked_buffers = True
        if names := self.buffers.changed_names():
            raise ConfigError(
                f"train.deterministic=topology: the model's buffer {names[0]} is changed by forward passes, one after "
                "the other, so it depends on which process computes which rows; nearest: train.deterministic=run"
            )


def _reduce(group: dist.ProcessGroup | None, operation: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
    def reduce(values: Tensor) -> Tensor:
        if group is not None:
            dist.all_reduce(values, operation, group=group)
        return values

    return reduce


def _exact_sum(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
