"""A rank of test_initial_values.py: how many numbers each process draws, and what weights a strategy begins with.

python -m tests.models.initial_values_rank OUT CASES    (under torchrun; JSON: name -> overrides)

Rank 0 writes OUT: name -> {"drawn": by rank, "weights": whole, "loaded": drawn by rank where a checkpoint gives all,
"read": by rank of weights that are given (only under fsdp),
"numbers": how many values are there without them}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.parity import cells
from tests.strategies.ragged import Objective
from tests.strategies.traffic_rank import config_of
from trainer import topology
from trainer.checkpoint.state import FlatShard
from trainer.config import Config
from trainer.models import ModelFactory
from trainer.optim.build import build_optimizer
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepOptions
from trainer.topology import Topology


class Counted:
    """A factory of models that count what they draw."""

    def __init__(self, config: Config):
        self.drawn, self.config = 0, config
        plain = cells.factory(config.model, torch.float32)
        self.make, self.factory = plain.build, replace(plain, build=self.build)

    def build(self) -> nn.Module:
        model = self.make()
        initialise = model.initialise

        def counting(name: str, value: Tensor, generator: torch.Generator) -> None:
            self.drawn += value.numel()
            initialise(name, value, generator)  # type: ignore[operator]

        model.initialise = counting  # type: ignore[assignment]
        return model


def strategy_of(config: Config, factory: ModelFactory, ranks: Topology) -> Any:
    options = StepOptions(clip_norm=0.0, activation_checkpointing="none", compile=False)
    strategy = plugin(config, "strategy")(config.strategy, ranks, Precision(ranks.device), Objective(), options)
    strategy.setup(factory, lambda model: build_optimizer(config, model))
    return strategy


def values_of(state: Any) -> list[Tensor]:
    plain = [
        value.values if isinstance(value, FlatShard) else value for name, value in state if name.startswith("model/")
    ]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in plain]


def found(overrides: str, joined: Topology) -> dict[str, Any]:
    config = config_of(overrides, joined.world_size)
    ranks = joined.with_layout(config.layout(joined.world_size))
    counted = Counted(config)
    strategy = strategy_of(config, counted.factory, ranks)
    weights = {name: tensor.clone() for name, tensor in strategy.full_weights()}
    strategy.close()
    again = Counted(config)
    strategy = strategy_of(config, replace(again.factory, loaded=True), ranks)
    numbers = sum(int(tensor.isfinite().sum()) for tensor in values_of(strategy.state().items()))
    strategy.close()
    read = [0]

    def given(name: str, value: Tensor) -> None:
        read[0] += value.numel()
        value.fill_(len(name))

    others = replace(Counted(config).factory, pretrained=given)
    strategy = strategy_of(config, others, ranks) if overrides == "strategy=fsdp" else None
    if strategy:
        assert all(bool((value == len(name)).all()) for name, value in strategy.full_weights())
        strategy.close()
    return {
        "read": ranks.gather(read[0]),
        "drawn": ranks.gather(counted.drawn),
        "weights": weights,
        "loaded": ranks.gather(again.drawn),
        "numbers": sum(ranks.gather(numbers)),
    }


def main(out: Path, cases: dict[str, str]) -> None:
    joined = topology.join(timeout_s=300)
    every = {name: found(overrides, joined) for name, overrides in cases.items()}
    if joined.is_main:
        torch.save(every, out)
    joined.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
