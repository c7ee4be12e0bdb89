"""The arithmetic of a step whose sums have the same bits on any topology."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import fault_points
from trainer.errors import ConfigError
from trainer.models import ModelFactory
from trainer.objectives import NUM_TARGETS, Batch, Normalizers, Objective, Sums
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.base import OptimizerFactory
from trainer.strategies.buffers import buffer_slots
from trainer.strategies.leafwise.exact_sums import sums_of_squares
from trainer.strategies.leafwise.leaves import Leaves
from trainer.strategies.tensor_parallel import local_tensor


class GradientShards(NamedTuple):
    """What a rank has of a model's gradients, parameter by parameter."""

    tensors: list[Tensor]
    """numel 0 where it has nothing, or where another rank of the group counts the same elements."""
    sizes: list[int]
    """Elements of the whole gradients."""
    group: dist.ProcessGroup | None
    """The ranks that have all of it together; None if this one has."""


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
        self._raise_if_part_of_a_step(objective)
        normalizers, leaf_sums = self.reduce_leaf_counts(micro_batches, objective, abandoned)
        self.buffers.snapshot()
        with nullcontext() if self.has_checked_buffers else self._checked_buffers():
            self.run_leaves(micro_batches, objective, normalizers, leaf_sums)
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
        goes to the row of its leaf, to which all others add zeros, so that every rank adds up the same matrix."""
        rows = torch.stack([row if isinstance(row, Tensor) else torch.stack(list(row)) for row in local])
        by_leaf = rows.new_zeros((self.leaves.count, rows.shape[1]))
        by_leaf[list(self.leaves.local)] = rows
        return self.all_reduce(by_leaf).sum(0)

    def accumulate(self, batch_sums: list[Sums], sums: Sums) -> list[Sums]:
        return [*batch_sums, sums]

    def reduce_batches(self, batch_sums: Sequence[Sums]) -> dict[str, float]:
        """Adds up exactly: the batches of an evaluation are the same wherever they are computed, their order is not."""
        by_leaf = {
            name: torch.zeros(
                (len(batch_sums), self.topology.dp_size), dtype=torch.float64, device=self.topology.device
            )
            for name in dict.fromkeys(name for sums in batch_sums for name in sums)
        }
        for number, sums in enumerate(batch_sums):
            for name, value in sums.items():
                by_leaf[name][number, self.topology.dp_rank] = value
        totals = self.reduce({name: values.reshape(-1) for name, values in by_leaf.items()})
        return {name: _exact_sum(values) for name, values in totals.items()}

    def num_padded(self, rows: int) -> int:
        """Pads every leaf to its full size: kernels may add up otherwise for other shapes."""
        return max(rows, self.options.micro_batch)

    def row_order(self, row_counts: Sequence[int]) -> Tensor:
        deal, replicas = self.options.deal, len(row_counts)
        rows = [deal.rows(sum(row_counts), replica, replicas) for replica in range(replicas)]
        if [len(of_replica) for of_replica in rows] != list(row_counts):  # some are left out, nobody knows which
            size = self.options.micro_batch * replicas * -(-max(row_counts) // self.options.micro_batch)
            rows = [deal.rows(size, replica, replicas)[:count] for replica, count in enumerate(row_counts)]
        return torch.cat([torch.from_numpy(of_replica) for of_replica in rows]).argsort()

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Returns the norm of all gradients, whichever of them are here: those of `gradient_shards`."""
        shards = self.gradient_shards()
        reduce_max, reduce = (_reduce(shards.group, op) for op in (dist.ReduceOp.MAX, dist.ReduceOp.SUM))
        squares = sums_of_squares(shards.tensors, shards.sizes, self.topology.device, reduce_max, reduce)
        return squares.sum().sqrt().float()

    def gradient_shards(self) -> GradientShards:
        """Returns what this rank has of the gradients of the whole model."""
        tensors = [self.local_gradient(parameter) for parameter in self.parameters]
        return GradientShards(tensors, [parameter.numel() for parameter in self.parameters], None)

    def local_gradient(self, parameter: nn.Parameter | None) -> Tensor:
        if parameter is None or parameter.grad is None:
            return torch.empty(0, device=self.topology.device)
        return local_tensor(parameter.grad)

    def _raise_if_part_of_a_step(self, objective: Objective) -> None:
        """Raises ConfigError for an update with a part of a step's micro-batches: they are of other leaves on each
        number of processes."""
        sizes = self.options.batch_sizes
        if sizes and self.leaves.count * self.options.micro_batch not in sizes:
            raise ConfigError(
                f"train.deterministic=topology: {type(objective).__name__} updates the model with "
                f"{self.leaves.local_count} of a step's micro-batches, which are other sequences on another number of "
                "processes; nearest: train.deterministic=run"
            )

    @contextmanager
    def _checked_buffers(self) -> Iterator[None]:
        """Raises ConfigError if the passes within change the model's buffers, as batch norm does: each replica changes
        them by its own rows. Whole numbers of the model's `statistics` may change, as their sums are exact."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        before = {(module, name): _local_clone(module._buffers[name]) for module, name in buffer_slots(self.model)}
        yield
        self.has_checked_buffers = True
        for (module, name), value in before.items():
            path, now = f"{paths[id(module)]}.{name}".lstrip("."), _local_clone(module._buffers[name])
            is_count = path in getattr(self.model, "statistics", ()) and torch.equal(now, now.round())
            if not is_count and not torch.equal(now, value):
                raise ConfigError(
                    f"train.deterministic=topology: the model's buffer {path} is changed by forward passes, one after "
                    "the other, so it depends on which process computes which rows; nearest: train.deterministic=run"
                )


def _local_clone(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return local_tensor(buffer).detach().clone()


def _reduce(group: dist.ProcessGroup | None, operation: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
    def reduce(values: Tensor) -> Tensor:
        if group is not None:
            dist.all_reduce(values, operation, group=group)
        return values

    return reduce


def _exact_sum(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
