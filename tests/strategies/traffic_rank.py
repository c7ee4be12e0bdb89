"""A rank of test_traffic.py: what the processes of a strategy send in a step, and the curve that comes of it.

python -m tests.strategies.traffic_rank CASES    (under torchrun; JSON: name -> [overrides, micro-batches a step])

Rank 0 prints JSON: name -> {"train", "update": collectives of the last step; "losses", "norms"}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from tests.parity import cells
from tests.strategies.counted import counted
from tests.strategies.ragged import EPSILON, LR, Objective
from trainer import topology
from trainer.config import Config
from trainer.config.compose import load
from trainer.optim.build import build_optimizer
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepOptions
from trainer.topology import Topology

STEPS, SEQUENCES = 2, 16


def config_of(overrides: str, processes: int) -> Config:
    model = [f"model.{value}" for value in (*cells.MODEL, "layers=4")]
    sizes = [f"train.global_batch={12 * SEQUENCES}", f"data.sequence_length={cells.LENGTH}"]
    return load([*model, *sizes, f"optimizer.lr={LR}", f"optimizer.eps={EPSILON}", *overrides.split()], processes)


def strategy_of(config: Config, ranks: Topology) -> Any:
    options = StepOptions(clip_norm=cells.CLIP, activation_checkpointing="none", compile=False)
    precision = Precision(ranks.device, "fp32", reduce=config.precision.reduce)
    strategy = plugin(config, "strategy")(config.strategy, ranks, precision, Objective(), options)
    strategy.setup(cells.factory(config.model, torch.float32), lambda model: build_optimizer(config, model))
    return strategy


def trained(overrides: str, accumulation: int, joined: Topology) -> dict[str, Any]:
    config = config_of(overrides, joined.world_size)
    ranks = joined.with_layout(config.layout(joined.world_size))
    strategy = strategy_of(config, ranks)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        mine = cells.rows(ranks.dp_rank, ranks.dp_size, step)
        parts = zip(*[tensor.chunk(accumulation) for tensor in mine.values()], strict=True)
        batches = [dict(zip(mine, part, strict=True)) for part in parts]
        sums: dict[str, torch.Tensor] = {}
        updates = []
        found["train"] = counted(lambda: sums.update(strategy.train_step(batches)))  # noqa: B023
        found["update"] = counted(lambda: updates.append(strategy.update(LR)))  # noqa: B023
        numbers = strategy.reduce({name: value.reshape(1) for name, value in sums.items()})
        found["losses"].append(numbers["loss"][0] / numbers["num_targets"][0])
        found["norms"].append(float(updates[0].grad_norm))
    strategy.close()
    return found


def main(cases: dict[str, tuple[str, int]]) -> None:
    joined = topology.join(timeout_s=300)
    found = {name: trained(overrides, accumulation, joined) for name, (overrides, accumulation) in cases.items()}
    if joined.is_main:
        print(json.dumps(found))
    joined.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
