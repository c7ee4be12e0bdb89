"""The leaves of an update: its micro-batches, numbered over all replicas, and the sums of their gradients.

A replica adds up its own gradients along the tree of `sum_tree`. What it cannot add up alone it exchanges in chunks, so
that each rank adds up the upper part of the tree for one chunk: the traffic of a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.data.deal import Deal
from trainer.strategies.buckets import split_into_buckets
from trainer.strategies.leafwise.sum_tree import Node, SumTree, find_branches
from trainer.strategies.used_parameters import all_reduce_any


class Leaves:
    """The leaves of the update that is being computed. All replicas have the same number of them."""

    def __init__(self, deal: Deal, replica: int, replicas: int):
        self.deal, self.replica, self.replicas = deal, replica, replicas
        self.begin(1)

    def begin(self, local_count: int) -> None:
        """Begins an update of so many micro-batches on each replica."""
        self.local_count, self.count = local_count, local_count * self.replicas
        self.local = self.of(self.replica)
        self.number = 0  # of the micro-batch that is being computed, on this replica

    def of(self, replica: int) -> tuple[int, ...]:
        """Returns the numbers of a replica's leaves, in the order in which it computes them."""
        return self.deal.leaves_of(self.count, replica, self.replicas)

    @property
    def is_last(self) -> bool:
        return self.number == self.local_count - 1


class LeafGradients:
    """Sums the gradients of parameters that a rank has whole after the backward pass of a leaf.

    `parameters` returns them, always in the same order. `group`: the ranks of the replicas, in their order; None for a
    single replica.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[nn.Parameter]],
        leaves: Leaves,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ):
        self.parameters, self.leaves, self.group, self.device = parameters, leaves, group, device
        self.tree = SumTree(1)

    def begin(self) -> None:
        self.tree = SumTree(self.leaves.count)

    def take(self, leaf: int) -> None:
        """Adds the gradients of a leaf, which the parameters then have no more."""
        self.tree.add((leaf, leaf + 1), take_gradients(self.parameters()))

    def finish(self) -> None:
        """Gives each parameter the sum of its gradients, or its shard of the sum if it is sharded over the group. A
        parameter without a gradient in any leaf has none."""
        parameters = self.parameters()
        totals = self._without_negative_zeros() if self.group is None else self._exchange(parameters, self.group)
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total

    def _without_negative_zeros(self) -> list[Tensor | None]:
        return [None if total is None else total.add_(0.0) for total in self.tree.take_total()]

    @torch.no_grad()
    def _exchange(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> list[Tensor | None]:
        sums = [list(self.tree.sums.pop(node)) for node in sorted(self.tree.sums)]
        is_used = [any(value is not None for value in values) for values in zip(*sums, strict=True)]
        is_used_anywhere = all_reduce_any(is_used, self.device, group)
        if not all(is_used):  # the host waits only where something is missing
            is_used = [bool(flag) for flag in is_used_anywhere.tolist()]
        leaves = self.leaves
        branches = [find_branches(leaves.of(replica), leaves.count) for replica in range(leaves.replicas)]
        totals: list[Tensor | None] = [None] * len(parameters)
        numbers = iter([number for number, flag in enumerate(is_used) if flag])
        for bucket in split_into_buckets([parameters[number] for number, flag in enumerate(is_used) if flag]):
            of_bucket = [next(numbers) for _ in bucket]
            chunks = [_in_chunks([values[number] for number in of_bucket], bucket, leaves.replicas) for values in sums]
            for values in sums:  # they are in the chunks now
                for number in of_bucket:
                    values[number] = None
            total = exchange(chunks, branches, leaves.count, group)
            for number, value in zip(of_bucket, _from_chunks(total, bucket, group), strict=True):
                totals[number] = value
        return totals


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Returns the gradients of parameters, which have none afterwards."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


@torch.no_grad()
def exchange(
    sums: Sequence[Tensor], branches: Sequence[Sequence[Node]], leaves: int, group: dist.ProcessGroup
) -> Tensor:
    """Returns this rank's chunk of the sum over all leaves.

    `branches`: those that each rank of the group has summed up; `sums`: those of this rank, each [ranks, chunk].
    """
    ranks, chunk = sums[0].shape
    sent = (sums[0] if len(sums) == 1 else torch.stack(list(sums), dim=1)).view(-1)  # [ranks, branches, chunk]
    counts = [len(nodes) for nodes in branches]
    received = sent.new_empty(sum(counts) * chunk)
    dist.all_to_all_single(
        received, sent, [count * chunk for count in counts], [len(sums) * chunk] * ranks, group=group
    )
    tree = SumTree(leaves)
    for node, values in zip(chain(*branches), received.view(-1, chunk).unbind(), strict=True):
        tree.add(node, [values])
    (total,) = tree.take_total()
    assert total is not None
    return total.add_(0.0)  # -0.0, of which some sums have none, is 0.0


def fill_missing(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Returns gradients with zeros for None: whole tensors, also for sharded parameters, whose gradients are whole."""
    return [
        torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def _in_chunks(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], ranks: int) -> Tensor:
    """Returns gradients (zeros for None) in equal chunks, padded, [ranks, chunk]: of sharded parameters the chunks of
    torch's `Shard(0)`, one parameter after the other in each."""
    present = fill_missing(gradients, parameters)
    if not isinstance(parameters[0], DTensor):
        flat = [gradient.reshape(-1) for gradient in present]
        missing = -sum(map(len, flat)) % ranks
        return torch.cat([*flat, flat[0].new_zeros(missing)]).view(ranks, -1)
    rows = [gradient.reshape((gradient.shape or (1,))[0], -1) for gradient in present]
    pad = torch.nn.functional.pad
    return torch.cat([pad(value, (0, 0, 0, -len(value) % ranks)).view(ranks, -1) for value in rows], 1)


def _from_chunks(total: Tensor, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> list[Tensor]:
    """Returns the sum for each parameter, of which this rank has a chunk: whole, or for a sharded one as it is."""
    ranks = dist.get_world_size(group)
    if isinstance(parameters[0], DTensor):
        sizes = [-(-(parameter.shape or (1,))[0] // ranks) * (parameter.numel() // (parameter.shape or (1,))[0])
                 for parameter in parameters]  # fmt: skip
        return [_sharded(chunk, parameter) for chunk, parameter in zip(total.split(sizes), parameters, strict=True)]  # type: ignore[arg-type]
    whole = total.new_empty(ranks * len(total))
    dist.all_gather_into_tensor(whole, total, group=group)
    sizes = [parameter.numel() for parameter in parameters]
    values = whole[: sum(sizes)].split(sizes)
    return [value.view(parameter.shape) for value, parameter in zip(values, parameters, strict=True)]


def _sharded(chunk: Tensor, parameter: DTensor) -> Tensor:
    local = parameter.to_local()
    return DTensor.from_local(
        chunk[: local.numel()].view(local.shape), parameter.device_mesh, parameter.placements,
        run_check=False, shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
