"""Leafwise strategies under FSDP2: fsdp and hsdp.

FSDP2 sums gradients layer by layer, after each micro-batch; here by a reduce-scatter of our own, which sends the chunks
of a leaf's gradient to the ranks that keep them, where they are added up along the tree. The ranks compute neighboring
leaves at the same time, so that few sums are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainer.errors import ConfigError, TrainingError
from trainer.models import ModelFactory
from trainer.objectives import Batch, Normalizers, Objective, Sums
from trainer.strategies.fsdp import FSDP, HSDP
from trainer.strategies.leafwise.arithmetic import GradientShards, LeafwiseArithmetic
from trainer.strategies.leafwise.leaves import Leaves, exchange
from trainer.strategies.leafwise.sum_tree import SumTree, find_branches


class TreeReduceScatter:
    """The reduce-scatter of one FSDP2 module (torch's protocol `ReduceScatter`).

    Its output is zero until the last micro-batch of an update, then the sum over all leaves, to which FSDP2 adds the
    zeros of before. `replicas`: the group of ranks with the same shard of other replicas (hsdp), over which FSDP2
    all-reduces the output: there each rank has the sum of a part, and zeros elsewhere.
    """

    def __init__(self, name: str, leaves: Leaves, shard_ranks: int, replicas: dist.ProcessGroup | None):
        self.name, self.leaves, self.shard_ranks, self.replicas = name, leaves, shard_ranks, replicas
        self.tree, self.is_summing = SumTree(1), False

    def begin(self) -> None:
        self.tree, self.is_summing = SumTree(self.leaves.count), True

    def end(self) -> None:
        """Raises TrainingError if the update's gradients were not all summed."""
        self.is_summing = False
        if self.tree.sums:
            raise self._called_unevenly()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if not self.is_summing:  # the backward pass of something else than an update
            output_tensor.zero_()
            return
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        first = self.leaves.replica // self.shard_ranks * self.shard_ranks
        for rank, chunk in enumerate(received.view(self.shard_ranks, -1).unbind()):
            self._add(self.leaves.of(first + rank)[self.leaves.number], chunk)
        if not self.leaves.is_last:
            # A chunk is a view of all that was received, which would be kept with it.
            self.tree.sums = {node: [_owned(value) for value in values] for node, values in self.tree.sums.items()}
            output_tensor.zero_()
        elif self.replicas is None:
            if not self.tree.is_complete:
                raise self._called_unevenly()
            (total,) = self.tree.take_total()
            assert total is not None
            output_tensor.copy_(total.add_(0.0))  # -0.0, of which some sums have none, is 0.0
        else:
            self._sum_over_replicas(output_tensor, self.replicas)

    def _add(self, leaf: int, chunk: Tensor) -> None:
        try:
            self.tree.add((leaf, leaf + 1), [chunk])
        except ValueError as error:
            raise TrainingError(
                f"{self.name}: is called twice in a forward pass, which train.deterministic=topology cannot sum under "
                "FSDP2; nearest: strategy=ddp"
            ) from error

    def _sum_over_replicas(self, output: Tensor, replicas: dist.ProcessGroup) -> None:
        leaves, size = self.leaves, dist.get_world_size(replicas)
        branches = [
            find_branches(
                tuple(leaf for rank in range(self.shard_ranks) for leaf in leaves.of(group * self.shard_ranks + rank)),
                leaves.count,
            )
            for group in range(size)
        ]
        if sorted(self.tree.sums) != branches[dist.get_rank(replicas)]:
            raise self._called_unevenly()
        padding = -len(output) % size
        sums = [
            torch.nn.functional.pad(value, (0, padding)).view(size, -1)
            for node in sorted(self.tree.sums)
            for value in self.tree.sums.pop(node)
            if value is not None
        ]
        parts = output.new_zeros((size, sums[0].shape[1]))
        parts[dist.get_rank(replicas)] = exchange(sums, branches, leaves.count, replicas)
        output.copy_(parts.view(-1)[: len(output)])

    def _called_unevenly(self) -> TrainingError:
        return TrainingError(
            f"{self.name}: was called for some micro-batches of the step only, so its gradients cannot be summed; use "
            "strategy=ddp"
        )


class LeafwiseFSDP(LeafwiseArithmetic, FSDP):
    finds_unused = True  # type: ignore[assignment]  # of all micro-batches the same parameters are summed

    def build(self, model_factory: ModelFactory) -> nn.Module:
        model = super().build(model_factory)
        mesh = self.fsdp_mesh(self.topology.mesh())
        self.shard_group = mesh.get_group(mesh.ndim - 1)
        shard_ranks, replicas = dist.get_world_size(self.shard_group), mesh.get_group(0) if mesh.ndim > 1 else None
        if shard_ranks == 1:
            raise ConfigError(
                "train.deterministic=topology: strategy.shard_size, the processes of a node by default, is 1 here, so "
                "nothing is sharded; nearest: strategy=ddp"
            )
        self.reductions = []
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                reduction = TreeReduceScatter(name or "the model", self.leaves, shard_ranks, replicas)
                module.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]
                self.reductions.append(reduction)
        return model

    def sync(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()  # after each micro-batch, whatever `strategy.reduce` says

    def run_leaves(
        self, micro_batches: Sequence[Batch], objective: Objective, normalizers: Normalizers, leaf_sums: list[Sums]
    ) -> None:
        for reduction in self.reductions:
            reduction.begin()
        super().run_leaves(micro_batches, objective, normalizers, leaf_sums)
        for reduction in self.reductions:
            reduction.end()

    def gradient_shards(self) -> GradientShards:
        return super().gradient_shards()._replace(group=self.shard_group)


class LeafwiseHSDP(LeafwiseFSDP, HSDP):
    def sync(self, last: bool) -> AbstractContextManager[object]:
        self.model.set_requires_all_reduce(last)  # type: ignore[operator]
        return nullcontext()


def _owned(value: Tensor | None) -> Tensor | None:
    is_view = value is not None and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if value is not None and is_view else value
