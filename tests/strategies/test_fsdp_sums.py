"""Sums over micro-batches that FSDP2 keeps between backward passes, in one process: what is left over is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.config.compose import load
from trainer.errors import ConfigError, TrainingError
from trainer.precision import Precision
from trainer.strategies.fsdp import require_released_gradients, rounds_sums, shard

CPU = torch.device("cpu")


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, used: int) -> Tensor:
        for block in self.blocks[:used]:
            x = block(x)
        return x.sum()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
    dist.destroy_process_group()


def after(mesh: DeviceMesh, *used: int) -> Optional:
    """After a step whose micro-batches used that many of the layers."""
    model = Optional()
    shard(model, model.blocks, mesh, Precision(CPU), reshard_after_forward=True)
    for number, layers in enumerate(used, 1):
        last = number == len(used)
        model.set_requires_all_reduce(last)  # type: ignore[operator]
        with require_released_gradients(model) if last else nullcontext():
            model(torch.ones(2, 4), layers).backward()
    return model


def test_layers_of_the_last_micro_batch_have_the_sums_of_all(mesh: DeviceMesh) -> None:
    model = after(mesh, 1, 2, 2)
    assert model.blocks[1].bias.grad.full_tensor().tolist() == [4.0] * 4  # two rows in each of two micro-batches


def test_a_layer_that_the_last_micro_batch_left_out_is_named(mesh: DeviceMesh) -> None:
    with pytest.raises(TrainingError, match=r"blocks\.1: has gradients from an earlier micro-batch.*reduce=last"):
        after(mesh, 2, 1)


@pytest.mark.parametrize(
    ("param", "reduce", "gather", "rounded"),
    [
        ("fp32", "fp32", "param", False),
        ("fp32", "bf16", "param", True),
        ("fp32", "fp32", "compute", True),
        ("bf16", "bf16", "param", False),
        ("bf16", "fp32", "param", False),
    ],
)
def test_sums_in_a_shorter_type_are_known(param: str, reduce: str, gather: str, rounded: bool) -> None:
    assert rounds_sums(Precision(CPU, "bf16", param=param, reduce=reduce), gather) == rounded


@pytest.mark.parametrize("overrides", ["precision.reduce=bf16", "precision=bf16 strategy.gather=compute"])
def test_they_are_refused_where_all_would_be_rounded(overrides: str) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.reduce=last: not where gradients are sent in bf16"):
        load(["strategy=fsdp", "strategy.reduce=last", *overrides.split()], 2)
