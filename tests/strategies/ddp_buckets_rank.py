"""One of two ranks of test_buffers.py: DDP's throw-away passes, with compiled layers.

Prints, of each model, how many graphs were compiled in two steps, how many inputs of them had symbolic sizes, and how
many tensors and generators differ behind the passes from what they were before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.strategies import ragged
from tests.zoo import models
from trainer import topology
from trainer.config.compose import load
from trainer.models import ModelFactory
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.ddp import DDP


def left_behind(strategy: DDP, batch: dict[str, torch.Tensor]) -> int:
    def now() -> list[torch.Tensor]:
        held = [*strategy.model.parameters(), *strategy.model.buffers(), torch.get_rng_state()]
        return [tensor.detach().clone() for tensor in held]

    before = now()
    strategy._settle_buckets(batch, strategy.objective)
    gradients = [parameter for parameter in strategy.parameters if parameter.grad is not None]
    return len(gradients) + sum(not torch.equal(a, b) for a, b in zip(before, now(), strict=True))


def main() -> None:
    ranks = topology.join(timeout_s=300)
    compile_layer: Any = nn.Module.compile
    inputs: list[list[Any]] = []

    def counted(_graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        inputs.append(examples)
        return _graph.forward

    nn.Module.compile = lambda layer: compile_layer(layer, backend=counted)  # type: ignore[method-assign, assignment]
    options = StepOptions(clip_norm=ragged.CLIP, activation_checkpointing="none", compile=True, micro_batch=4)
    for kind in (models.Net, models.BatchNorm):
        torch._dynamo.reset()
        inputs.clear()
        config = load(["strategy=ddp"], ranks.world_size)
        strategy = plugin(config, "strategy")(
            config.strategy, ranks, Precision(ranks.device), ragged.Objective(), options
        )
        shape = (kind.Config(name="net"), ragged.FACTS)
        strategy.setup(ModelFactory(lambda kind=kind, shape=shape: kind(*shape), seed=5), ragged.optimizer)
        mine = {key: tensor[ranks.dp_rank :: ranks.dp_size] for key, tensor in ragged.batch(1).items()}
        changed = left_behind(strategy, mine)
        for _ in range(2):
            strategy.train_step([mine])
            strategy.update(ragged.LR)
        flat = [value for examples in inputs for value in examples]
        symbolic = sum(
            isinstance(size, torch.SymInt)
            for value in flat
            for size in ([*value.shape] if isinstance(value, torch.Tensor) else [value])
        )
        line = f"{kind.__name__}: graphs {len(inputs)}, symbolic {symbolic}, left behind {changed}"
        print(line + "\n", end="", flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
