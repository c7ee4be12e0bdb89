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

from trainer.errors import TrainingError
from trainer.models import ModelFactory
from trainer.objectives import Batch, Normalizers, Objective, Sums
from trainer.strategies.fsdp import FSDP, HSDP
from trainer.strategies.leafwise.arithmetic import LeafwiseArithmetic
from trainer.strategies.leafwise.leaves import Leaves, exchange
from trainer.strategies.leafwise.sum_tree import SumTree, branches


class TreeReduceScatter:
    """The reduce-scatter of one FSDP2 module (torch's protocol `ReduceScatter`).

    Its output is zero until the last micro-batch of an update, then the sum over all leaves, to which FSDP2 adds the
    zeros of before. `replicas`: the group of ranks with the same shard of other replicas (hsdp), over which FSDP2
    all-reduces the output: there each rank has the sum of a part, and zeros elsewhere.
    """

    def __init__(self, leaves: Leaves, shard_ranks: int, replicas: dist.ProcessGroup | None):
        self.leaves, self.shard_ranks, self.replicas = leaves, shard_ranks, replicas
        self.tree = SumTree(1)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        leaves = self.leaves
        if leaves.number == 0:
            self.tree = SumTree(leaves.count)
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        first = leaves.replica // self.shard_ranks * self.shard_ranks
        for rank, chunk in enumerate(received.view(self.shard_ranks, -1).unbind()):
            leaf = leaves.of(first + rank)[leaves.number]
            self.tree.add((leaf, leaf + 1), [chunk])
        if not leaves.is_last:
            # A chunk is a view of all that was received, which would be kept with it.
            self.tree.sums = {node: [_owned(value) for value in values] for node, values in self.tree.sums.items()}
            output_tensor.zero_()
        elif self.replicas is None:
            (total,) = self.tree.take_total()
            assert total is not None
            output_tensor.copy_(total.add_(0.0))  # -0.0, of which some sums have none, is 0.0
        else:
            self._sum_over_replicas(output_tensor, self.replicas)

    def _sum_over_replicas(self, output: Tensor, replicas: dist.ProcessGroup) -> None:
        leaves, size = self.leaves, dist.get_world_size(replicas)
        held = [
            branches(
                [leaf for rank in range(self.shard_ranks) for leaf in leaves.of(replica * self.shard_ranks + rank)],
                leaves.count,
            )
            for replica in range(size)
        ]
        padding = -len(output) % size
        sums = [
            torch.nn.functional.pad(value, (0, padding)).view(size, -1)
            for node in sorted(self.tree.sums)
            for value in self.tree.sums.pop(node)
            if value is not None
        ]
        parts = output.new_zeros((size, sums[0].shape[1]))
        parts[dist.get_rank(replicas)] = exchange(sums, held, leaves.count, replicas)
        output.copy_(parts.view(-1)[: len(output)])


class LeafwiseFSDP(LeafwiseArithmetic, FSDP):
    def build(self, model_factory: ModelFactory) -> nn.Module:
        model = super().build(model_factory)
        mesh = self.fsdp_mesh(self.topology.mesh())
        self.shard_group = mesh.get_group(mesh.ndim - 1)
        replicas = mesh.get_group(0) if mesh.ndim > 1 else None
        self.reductions = {}
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                self.reductions[name] = TreeReduceScatter(self.leaves, dist.get_world_size(self.shard_group), replicas)
                module.set_custom_reduce_scatter(self.reductions[name])  # type: ignore[arg-type]
        return model

    def sync(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()  # after each micro-batch, whatever `strategy.reduce` says

    def run_leaves(
        self, micro_batches: Sequence[Batch], objective: Objective, normalizers: Normalizers, leaf_sums: list[Sums]
    ) -> None:
        super().run_leaves(micro_batches, objective, normalizers, leaf_sums)
        if pending := next((name for name, reduction in self.reductions.items() if reduction.tree.sums), None):
            raise TrainingError(
                f"{pending or 'the model'}: has gradients from an earlier micro-batch of the step, but none from the "
                "last one, so they cannot be summed; use strategy.find_unused_parameters=true"
            )

    def norm_parts(self) -> tuple[list[Tensor], list[int], dist.ProcessGroup | None]:
        local = [self.local_gradient(parameter) for parameter in self.parameters]
        return local, self.sizes(), self.shard_group


class LeafwiseHSDP(LeafwiseFSDP, HSDP):
    def sync(self, last: bool) -> AbstractContextManager[object]:
        self.model.set_requires_all_reduce(last)  # type: ignore[operator]
        return nullcontext()


def _owned(value: Tensor | None) -> Tensor | None:
    is_view = value is not None and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if value is not None and is_view else value
