"""One of four ranks of test_step.py: two copies of a pipeline, sharded over each other, one with fewer sequences.

Prints, of each step, the loss a target and the gradient norm.
"""

from __future__ import annotations

import sys

import torch

from tests.parity import cells
from tests.strategies import ragged
from trainer import topology
from trainer.config.compose import load
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepOptions


def main(of_first: int) -> None:
    overrides = [
        "strategy=pipeline", "strategy.stages=2", "strategy.data_parallel=fsdp", "strategy.virtual_stages=4",
        "strategy.schedule=interleaved_zero_bubble", *(f"model.{value}" for value in cells.MODEL), "model.layers=8",
    ]  # fmt: skip
    joined = topology.join(timeout_s=60)
    config = load(overrides, joined.world_size)
    ranks = joined.with_layout(config.layout(joined.world_size))
    options = StepOptions(
        clip_norm=cells.CLIP, activation_checkpointing="none", compile=False, unequal_micro_batches=True
    )
    strategy = plugin(config, "strategy")(config.strategy, ranks, Precision(ranks.device), ragged.Objective(), options)
    strategy.setup(cells.factory(config.model, torch.float32), ragged.optimizer)
    rows = slice(0, of_first) if ranks.dp_rank == 0 else slice(of_first, None)
    for step in range(2):
        sums = strategy.train_step([{name: value[rows] for name, value in cells.rows(0, 1, step).items()}])
        numbers = strategy.reduce({name: value.reshape(1) for name, value in sums.items()})
        norm = float(strategy.update(ragged.LR).grad_norm)
        if ranks.is_main:
            print(numbers["loss"][0] / numbers["num_targets"][0], norm, flush=True)
    strategy.close()
    ranks.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
