"""Gradients of a leafwise step in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from trainer.strategies.leafwise.leaves import _in_chunks


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_missing_gradients_are_zeros_beside_others(one_rank: None, sharded: bool) -> None:
    values = [torch.arange(1.0, 7.0).view(3, 2), torch.ones(4)]
    mesh = init_device_mesh("cpu", (1,))
    parameters = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]) if sharded else value) for value in values]
    assert isinstance(parameters[0], DTensor) == sharded
    chunks = _in_chunks([values[0], None], parameters, 2)
    assert type(chunks) is torch.Tensor
    expected = (
        [[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0]]  # two rows each, the last one padded; then two of the other's
        if sharded
        else [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0]]
    )
    assert chunks.tolist() == expected
