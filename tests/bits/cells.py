"""The cells of the matrix of bits: which strategy on how many processes, and what is trained there.

Every cell has ragged batches with masked targets, several leaves on each process and active clipping.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.strategies.ragged import EPSILON, FACTS, LENGTH, LR, Objective, batch
from trainer.config import Config
from trainer.config.compose import load
from trainer.data.deal import Deal
from trainer.models import ModelFactory
from trainer.models.gpt import GPT
from trainer.objectives import Batch
from trainer.precision import Precision
from trainer.registry import load as load_class
from trainer.strategies.arithmetic import StepOptions
from trainer.strategies.leafwise import set_deterministic
from trainer.topology import Topology

SEQUENCES, LEAF, STEPS, CLIP = 24, 2, 50, 0.1
MODEL = ["width=16", "heads=2", "positions=learned", "activation=gelu", "bias=true"]
VARIANTS = ("tied", "untied", "dropout", "recomputed", "bf16")
QUICK_STEPS = 5


@dataclass(frozen=True)
class Cell:
    name: str
    processes: int
    overrides: str
    quick: tuple[str, ...] = ()
    """The variants that are also in `make test`."""
    layers: int = 4

    def config(self, variant: str) -> Config:
        model = [*MODEL, f"layers={self.layers}", f"dropout={0.3 if variant == 'dropout' else 0}"]
        sizes = [f"train.global_batch={SEQUENCES}", f"train.micro_batch={LEAF}", f"data.sequence_length={LENGTH}"]
        overrides = [*(f"model.{value}" for value in model), *sizes, "train.deterministic=topology"]
        overrides += ["precision=bf16"] if variant == "bf16" else []
        return load([*overrides, *self.overrides.split()], self.processes)


def cells() -> Iterator[Cell]:
    for n in (2, 3, 4):
        yield Cell("ddp", n, "strategy=ddp", quick=("recomputed",) if n == 2 else ())
        yield Cell("fsdp", n, "strategy=fsdp", quick=("dropout",) if n == 2 else ())
    yield Cell("hsdp 2 x 2", 4, "strategy=hsdp strategy.shard_size=2")
    pipeline = "strategy=pipeline strategy.schedule="
    for name, n in product(("1f1b", "interleaved_zero_bubble"), (2, 4)):
        quick = ("tied",) if (name, n) == ("1f1b", 2) else ()
        yield Cell(f"pipeline {name}", n, pipeline + name, quick, layers=8 if n == 4 else 4)
    yield Cell("pipeline zbv", 2, f"{pipeline}zbv")
    for name in ("1f1b", "interleaved_zero_bubble"):
        two = f"{pipeline}{name} strategy.stages=2"
        yield Cell(f"pipeline {name} 2 x ddp 2", 4, two)
        yield Cell(f"pipeline {name} 2 x fsdp 2", 4, f"{two} strategy.data_parallel=fsdp")


class Untied(GPT):
    """A GPT with an output layer of its own."""

    head_parts = ("norm", "head")

    def __init__(self, config: Any, facts: Any):
        super().__init__(config, facts)
        self.head = nn.Linear(config.width, facts.vocab_size, bias=False)

    def project(self, x: Tensor, batch: Batch) -> Tensor:
        return self.head(self.norm(x))


@dataclass
class Bits:
    """What must be the same to the last bit."""

    steps: list[tuple[str, str]]
    """Loss and gradient norm of each step, in hexadecimal."""
    state: dict[str, str]
    """The sha256 of each weight and moment."""


def trained(cell: Cell, ranks: Topology, variant: str, steps: int) -> Bits:
    """Trains as a run does, without its files."""
    config = cell.config(variant)
    ranks = ranks.with_layout(config.layout(ranks.world_size))
    deal = Deal.of(config, ranks.dp_size, ranks.local_size)
    set_deterministic(True, ranks.device)
    options = StepOptions(
        clip_norm=CLIP,
        activation_checkpointing="full" if variant == "recomputed" else "none",
        compile=False,
        micro_batch=LEAF,
        deal=deal,
    )
    precision = Precision(ranks.device, "bf16" if variant == "bf16" else "fp32")
    strategy = load_class(config.strategy.leafwise)(config.strategy, ranks, precision, Objective(), options)
    strategy.keeps_casts = False
    kind = Untied if variant == "untied" else GPT
    example = {name: value[:1] for name, value in batch(0, SEQUENCES).items()}
    factory = ModelFactory(lambda: kind(config.model, FACTS), seed=5, example=lambda: example)
    strategy.setup(
        factory, lambda module: torch.optim.AdamW(module.parameters(), lr=LR, eps=EPSILON, foreach=True, fused=False)
    )
    numbers = []
    for step in range(steps):
        rows = deal.rows(SEQUENCES, ranks.dp_rank, ranks.dp_size)
        local = {name: value[torch.from_numpy(rows)] for name, value in batch(step, SEQUENCES).items()}
        parts = [value.split(LEAF) for value in local.values()]
        sums = strategy.train_step([dict(zip(local, part, strict=True)) for part in zip(*parts, strict=True)])
        totals = strategy.reduce({name: value.reshape(1) for name, value in sums.items()})
        norm = strategy.update(LR).grad_norm
        assert norm > CLIP
        numbers.append(((totals["loss"][0] / totals["num_targets"][0]).hex(), float(norm).hex()))
    local_state = {name: _sha256(value) for name, value in sorted(strategy.state().items())}
    state: dict[str, str] = {}
    for of_rank in ranks.gather(local_state):
        assert all(state.setdefault(name, digest) == digest for name, digest in of_rank.items())
    strategy.close()
    return Bits(numbers, state)


def _sha256(value: Any) -> str:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return hashlib.sha256(whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
