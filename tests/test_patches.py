"""What trainer/patches.py relies on inside of torch and DeepSpeed is still there, and does what it is there for.

Tested with the strategies that need them: `release_saved_parameters` (strategies/test_zero.py),
`find_pending_reduction` (strategies/test_fsdp_sums.py), `compile_numbers_of_layers` (strategies/test_layers.py),
`compute_exact_powers` (the runs with offloaded state of strategies/test_zero.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from onecurve.paths import ROOT
from tests.strategies import ragged
from trainer.config.compose import load
from trainer.patches import (
    READ_IN,
    has_step_hooks,
    note_gradients,
    register_first_step_hook,
    share_step_hooks,
    timeout_of,
    without_values,
)
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepOptions
from trainer.topology import ALONE


@pytest.mark.parametrize("package", READ_IN)
def test_another_version_has_to_be_read_anew(package: str) -> None:
    """Read what trainer/patches.py changes in the new version, then say so in its READ_IN."""
    pinned = re.search(rf"^{package}==(\S+)$", (Path(ROOT) / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == READ_IN[package]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((2,), 7.0))


def test_modules_are_made_without_values() -> None:
    with without_values():
        model = Tied()
    assert model.embedding.weight.is_meta
    assert model.head.weight is model.embedding.weight
    assert model.get_buffer("scale").tolist() == [7.0, 7.0]
    assert not Tied().head.weight.is_meta  # outside of it


def stepped(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_hooks_behind_steps_are_ordered_and_shared() -> None:
    told: list[str] = []
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    assert not has_step_hooks(first)
    first.register_step_post_hook(lambda *_: told.append("average"))
    register_first_step_hook(first, lambda *_: told.append("put back"))
    share_step_hooks(second, first)
    assert has_step_hooks(second)
    stepped(first)
    stepped(second)
    assert told == ["put back", "average"] * 2


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.left_out = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    yield dist.group.WORLD  # type: ignore[misc]
    dist.destroy_process_group()


def test_how_long_a_group_waits(world: dist.ProcessGroup) -> None:
    assert timeout_of(world) == timedelta(seconds=77)


def test_fsdp_tells_which_parameters_have_a_gradient(world: dist.ProcessGroup) -> None:
    layer = HalfUsed()
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    noted: list[Tensor] = []
    note_gradients(layer, noted.append)
    layer(torch.ones(1, 2)).sum().backward()
    assert len(noted) == 1
    assert noted[0] is layer.used.weight
    assert layer.used.weight.grad is not None  # it is summed as ever


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_does_the_steps_that_are_accepted(stage: int) -> None:
    """One after the other in one process: each has to find nothing of the groups of the one before."""
    deepspeed: Any = pytest.importorskip("deepspeed")
    from deepspeed.comm import comm

    config = load(["strategy=zero", f"strategy.stage={stage}"], 1)
    options = StepOptions(clip_norm=1.0, activation_checkpointing="none", compile=False)
    made = plugin(config, "strategy")(config.strategy, ALONE, Precision(ALONE.device), ragged.Objective(), options)
    made.setup(ragged.factory(torch.float32), ragged.optimizer)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False

    def weights() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in made.full_weights()}

    before = weights()
    made.train_step([ragged.batch(0)])
    refused = made.update(ragged.LR, limit=0.0)
    assert bool(refused.bad)
    assert float(refused.grad_norm) > 0
    after = weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    made.train_step([ragged.batch(0)])
    assert made.update(ragged.LR, limit=1e9).grad_norm == refused.grad_norm
    after = weights()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    made.close()
    assert comm.cdb is None
    assert not dist.is_initialized()
