"""What `train.deterministic=topology` cannot keep is refused, with the reason and the nearest that works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.strategies import ragged
from tests.zoo import models
from trainer import topology
from trainer.config import schema
from trainer.config.compose import load
from trainer.data.deal import Deal
from trainer.errors import ConfigError
from trainer.models import ModelFactory
from trainer.precision import Precision
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.leafwise.replicas import LeafwiseReplicas

MODE = ("train.deterministic=topology", "train.micro_batch=2", "train.global_batch=24")


@pytest.mark.parametrize(
    ("processes", "overrides", "problem"),
    [
        (2, "train.micro_batch=null", "needs train.micro_batch: .*; nearest: train.micro_batch=4"),
        (1, "train.compile=true", "train.compile=true: .* nearest: train.compile=false"),
        (2, "strategy=zero", "strategy=zero adds up .* nearest: strategy=fsdp"),
        (2, "strategy=fsdp strategy.tensor_parallel=2", "strategy.tensor_parallel=2 .* nearest: .*tensor_parallel=1"),
        (2, "strategy=pipeline strategy.tensor_parallel=2", "strategy.tensor_parallel=2 .* nearest: "),
        (2, "strategy=fsdp strategy.gather=compute", "strategy.gather=compute .* nearest: strategy.gather=param"),
        (2, "strategy=hsdp strategy.shard_size=1", "strategy.shard_size=1 .* nearest: strategy=ddp"),
        (2, "precision.reduce=bf16", "precision.reduce=bf16: .* nearest: precision.reduce=fp32"),
        (1, "precision.compute=fp8", "precision.compute=fp8: not with train.deterministic=topology"),
        (2, "optimizer=muon", "optimizer=muon: .* nearest: optimizer=adamw"),
        (2, "optimizer.implementation=fused", "implementation=fused: .* nearest: optimizer.implementation=foreach"),
        (5, "strategy=ddp", "train.global_batch=24: is not a multiple of 5 processes x train.micro_batch=2 = 10"),
    ],
)
def test_before_the_start(processes: int, overrides: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){problem}"):
        load([*MODE, *overrides.split()], processes)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "hsdp strategy.shard_size=2", "pipeline"])
def test_what_can_is_not(strategy: str) -> None:
    load([*MODE, *f"strategy={strategy}".split()], 1 if strategy == "single" else 2)
    load([*MODE, "optimizer=lion"], 2)


def leafwise(kind: type) -> LeafwiseReplicas:
    alone, options = topology.join(timeout_s=60), StepOptions(1.0, "none", False, micro_batch=4, deal=Deal(4))
    section = schema.Single(name="single")
    strategy = LeafwiseReplicas(section, alone, Precision(alone.device, "fp32"), ragged.Objective(), options)
    strategy.setup(ModelFactory(lambda: kind(models.Net.Config(name="net"), ragged.FACTS), seed=5), ragged.optimizer)
    return strategy


def batches() -> list[dict[str, Tensor]]:
    return [{name: value[i : i + 4] for name, value in ragged.batch(0).items()} for i in (0, 4)]


def test_a_model_whose_forward_changes_buffers() -> None:
    with pytest.raises(ConfigError, match="running_mean is changed by forward passes"):
        leafwise(models.BatchNorm).train_step(batches())
    leafwise(models.Net).train_step(batches())


def test_short_micro_batches_are_padded_to_a_leaf() -> None:
    """What is quarantined makes a micro-batch shorter, not its kernels other ones."""
    strategy, sizes = leafwise(models.Net), []
    strategy.model.embedding.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    full, short = batches()
    sums = strategy.train_step([full, {name: value[:3] for name, value in short.items()}])
    assert sizes == [4, 4]
    assert sums["num_targets"] == sum(
        int((batch["targets"][:rows] != -100).sum()) for batch, rows in ((full, 4), (short, 3))
    )
    assert torch.isfinite(sums["loss"])
