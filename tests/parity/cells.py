"""The cells of the parity matrix, and how one is computed: a few steps of a strategy against plain torch in fp64.

Every cell has ragged batches with masked targets (ranks and micro-batches differ in how many they have) and active
clipping; it is computed with one and with four micro-batches a step, with and without recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn

from tests.strategies.ragged import EPSILON, FACTS, LENGTH, LR, Objective, batch, optimizer
from trainer.config import Config
from trainer.config.compose import load
from trainer.config.pipeline_schedules import SCHEDULES
from trainer.models import ModelFactory, cast_parameters
from trainer.models.gpt import GPT
from trainer.objectives.causal_lm import IGNORE
from trainer.precision import Precision
from trainer.registry import plugin
from trainer.strategies.arithmetic import StepArithmetic, StepOptions
from trainer.topology import Topology

SEQUENCES, STEPS, CLIP = 16, 5, 0.1
MODEL = ["width=16", "heads=2", "dropout=0", "positions=learned", "activation=gelu", "bias=true"]


@dataclass(frozen=True)
class Cell:
    name: str
    processes: int
    overrides: str
    quick: bool = False  # also in `make test`

    @property
    def fp64(self) -> bool:
        """DeepSpeed keeps its weights in fp32."""
        return not self.name.startswith("zero")

    def variants(self, precision: str, whole: bool) -> list[tuple[int, str]]:
        """(micro-batches a step, activation checkpointing). Of one process in bf16 all micro-batches that there are:
        how far off they get is what bf16 costs."""
        if not whole and self.processes > 1:
            return [(4, "full" if precision == "fp32" else "none")]
        many = (1, 2, 4, 8, 16) if self.processes == 1 and precision == "bf16" else (1, 4)
        return list(product(many, ("none", "full")))

    @property
    def layers(self) -> int:
        return 8 if self.name.startswith("pipeline") and self.processes == 4 and " x " not in self.name else 4

    def config(self) -> Config:
        model = [f"model.{value}" for value in (*MODEL, f"layers={self.layers}")]
        batch = [f"train.global_batch={12 * SEQUENCES}", f"data.sequence_length={LENGTH}"]
        return load([*model, *batch, *self.overrides.split()], self.processes)


def cells() -> Iterator[Cell]:
    yield Cell("single", 1, "strategy=single", quick=True)
    ddp = "strategy=ddp strategy.bucket_mb=1"
    for n in (2, 3, 4):
        yield Cell("ddp", n, ddp, quick=n == 2)
        yield Cell("fsdp", n, "strategy=fsdp", quick=n == 2)
    yield Cell("ddp, static_graph", 3, f"{ddp} strategy.static_graph=true")
    yield Cell("fsdp, kept after forward", 2, "strategy=fsdp strategy.reshard_after_forward=false")
    yield Cell("fsdp, cpu_offload", 2, "strategy=fsdp strategy.cpu_offload=true")
    yield Cell("hsdp 2 x 2", 4, "strategy=hsdp strategy.shard_size=2")
    for stage, n in product((0, 1, 2, 3), (1, 2, 3)):
        yield Cell(f"zero {stage}", n, f"strategy=zero strategy.stage={stage}", quick=n == 2 and stage == 3)
    yield Cell("zero 2, offload_optimizer", 2, "strategy=zero strategy.stage=2 strategy.offload_optimizer=true")
    offloaded = "strategy.offload_optimizer=true strategy.offload_parameters=true"
    yield Cell("zero 3, all offloaded", 2, f"strategy=zero strategy.stage=3 {offloaded}")
    pipeline = "strategy=pipeline strategy.schedule="
    for name, n in product(SCHEDULES, (2, 4)):
        yield Cell(f"pipeline {name}", n, pipeline + name, quick=n == 2 and name == "1f1b")
    for name in ("1f1b", "interleaved_zero_bubble"):
        two = f"{pipeline}{name} strategy.stages=2"
        yield Cell(f"pipeline {name} 2 x ddp 2", 4, two)
        yield Cell(f"pipeline {name} 2 x fsdp 2", 4, f"{two} strategy.data_parallel=fsdp")
    yield Cell("tensor 2", 2, "strategy=fsdp strategy.tensor_parallel=2")
    shared = "strategy.tensor_parallel=2 strategy.sequence_parallel=true strategy.loss_parallel=true"
    yield Cell("tensor 2, sequences and loss too", 2, f"strategy=fsdp {shared}")
    yield Cell("tensor 2, sequences and loss too, x fsdp 2", 4, f"strategy=fsdp {shared}")
    yield Cell("pipeline 1f1b 2 x tensor 2", 4, f"{pipeline}1f1b strategy.stages=2 {shared}")


def rounded_cells() -> Iterator[Cell]:
    """Whose gradients are added up in bf16, of fp32 computation."""
    for cell in cells():
        if cell.name in ("ddp", "fsdp") or cell.name.startswith("pipeline 1f1b 2 x "):
            yield replace(cell, overrides=f"{cell.overrides} precision.reduce=bf16")


def factory(shape: GPT.Config, dtype: torch.dtype) -> ModelFactory:
    return ModelFactory(lambda: cast_parameters(GPT(shape, FACTS), dtype), seed=5, example=lambda: rows(0, SEQUENCES))


def rows(first: int, every: int, step: int = 0) -> dict[str, Tensor]:
    return {name: tensor[first::every] for name, tensor in batch(step, SEQUENCES).items()}


@dataclass
class Curve:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]

    def away_from(self, other: Curve) -> dict[str, float]:
        """Relative differences: of loss and gradient norm on the worst step, of the worst weight to its tensor's
        largest."""
        pairs = {"loss": (self.losses, other.losses), "norm": (self.norms, other.norms)}
        found = {name: max(abs(a - b) / abs(b) for a, b in zip(*both, strict=True)) for name, both in pairs.items()}
        assert self.weights.keys() == other.weights.keys()
        away = [(self.weights[name].double() - w).abs().max() / w.abs().max() for name, w in other.weights.items()]
        return found | {"weights": float(max(away))}


@cache
def reference(layers: int) -> Curve:
    """Plain torch in float64: one process, one batch, the mean over targets, torch's own clipping and AdamW."""
    single = next(cells()).config().model
    model = factory(single.model_copy(update={"layers": layers}), torch.float64)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPSILON)
    losses, norms = [], []
    for step in range(STEPS):
        data = batch(step, SEQUENCES)
        logits = model(data).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, data["targets"].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    assert min(norms) > CLIP  # clipping is active
    return Curve(losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()})


def trained(
    cell: Cell,
    ranks: Topology,
    precision: str,
    accumulation: int,
    checkpointing: str,
    spoil: Callable[[StepArithmetic], None] | None = None,
) -> Curve:
    """The curve of the strategy under `precision`: fp64, fp32 or bf16. Weights are there on the main rank only."""
    config = cell.config()
    ranks = ranks.with_layout(config.layout(ranks.world_size))
    options = StepOptions(clip_norm=CLIP, activation_checkpointing=checkpointing, compile=False)
    compute = "bf16" if precision == "bf16" else "fp32"
    strategy = plugin(config, "strategy")(
        config.strategy, ranks, Precision(ranks.device, compute, reduce=config.precision.reduce), Objective(), options
    )
    strategy.setup(factory(config.model, torch.float64 if precision == "fp64" else torch.float32), optimizer)
    if spoil:
        spoil(strategy)
    losses, norms = [], []
    for step in range(STEPS):
        mine = rows(ranks.dp_rank, ranks.dp_size, step)
        parts = [tensor.chunk(accumulation) for tensor in mine.values()]
        sums = strategy.train_step([dict(zip(mine, part, strict=True)) for part in zip(*parts, strict=True)])
        numbers = strategy.reduce({name: value.reshape(1) for name, value in sums.items()})
        losses.append(numbers["loss"][0] / numbers["num_targets"][0])
        norms.append(float(strategy.update(LR).grad_norm))
    weights = {name: tensor.clone() for name, tensor in strategy.full_weights()}
    strategy.close()
    return Curve(losses, norms, weights)
