"""One of two ranks of test_step.py: a gradient of fp16 overflows on the last rank only."""

from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor

from tests.strategies import ragged
from trainer import topology
from trainer.config.compose import load
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepArithmetic, StepOptions


def spoil(strategy: StepArithmetic, name: str, ranks: topology.Topology) -> None:
    """Makes the next gradient infinite, where this rank is the last: of what it computes (all ranks then add it up), or
    of the shard that it alone holds."""
    parameter = strategy.parameters[0]
    if ranks.rank != ranks.world_size - 1:
        return
    if name == "fsdp":
        assert isinstance(parameter.grad, DTensor)
        parameter.grad.to_local()[0, 0] = math.inf
    else:
        parameter.register_hook(lambda gradient: gradient.fill_(math.inf))


def main() -> None:
    ranks = topology.join(timeout_s=60)
    options = StepOptions(clip_norm=ragged.CLIP, activation_checkpointing="none", compile=False)
    for name in ("ddp", "fsdp"):
        config = load([f"strategy={name}"], ranks.world_size)
        strategy = plugin(config, "strategy")(
            config.strategy, ranks, Precision(ranks.device, "fp16"), ragged.Objective(), options
        )
        strategy.setup(ragged.factory(torch.float32), ragged.optimizer)
        mine = {key: tensor[ranks.dp_rank :: ranks.dp_size] for key, tensor in ragged.batch(1).items()}
        strategy.train_step([mine])
        taken = not strategy.update(ragged.LR).skipped
        before, scale = {key: tensor.clone() for key, tensor in strategy.state().items()}, strategy.scaler.scale
        if name == "ddp":
            spoil(strategy, name, ranks)
        strategy.train_step([mine])
        if name == "fsdp":
            spoil(strategy, name, ranks)
        skipped = bool(strategy.update(ragged.LR).skipped)
        same = all(
            torch.equal(strategy.full_tensor(before[key]), strategy.full_tensor(tensor))
            for key, tensor in strategy.state().items()
            if not key.startswith("scaler/")
        )
        told = (name, taken, skipped, same, strategy.scaler.scale / scale, strategy.scaler.growth_tracker)
        print(" ".join(map(str, told)) + "\n", end="", flush=True)  # at once: both ranks write to one pipe
    ranks.close()


if __name__ == "__main__":
    main()
