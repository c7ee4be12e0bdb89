"""One rank of test_ragged.py: steps in fp64 and fp32, where ranks and micro-batches differ in how many targets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import topology
from trainer.config import schema
from trainer.models import ModelFactory, of_type
from trainer.models.gpt import GPT
from trainer.objectives.causal_lm import IGNORE
from trainer.precision import Precision
from trainer.strategies.ddp import DDP
from trainer.strategies.fsdp import FSDP, HSDP
from trainer.strategies.single import Single, StepOptions

VOCABULARY, LENGTH, SEQUENCES, CLIP, LR = 50, 16, 8, 0.5, 0.01
# AdamW multiplies the rounding of a small gradient by up to LR / epsilon: with an epsilon of 1e-8 that alone would be
# 5e-6 of a weight in fp32, more or less with the CPU.
EPSILON = 1e-4
GPT2 = {"positions": "learned", "activation": "gelu", "bias": True, "fused_norm": False}
SHAPE = schema.GPT(name="gpt", layers=2, width=24, heads=2, dropout=0.0, **GPT2)


class Objective:
    """Causal LM without the text statistics."""

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((batch["targets"] != IGNORE).sum())

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        targets = batch["targets"].flatten()
        loss = nn.functional.cross_entropy(outputs.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
        return {"loss": loss, "count": (targets != IGNORE).sum()}


def factory(dtype: torch.dtype) -> ModelFactory:
    return ModelFactory(lambda: of_type(GPT(SHAPE, VOCABULARY, LENGTH), dtype), seed=5)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return factory(dtype)()


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=LR, eps=EPSILON, fused=True)


def batch(step: int) -> dict[str, Tensor]:
    """Sequence i keeps about i / SEQUENCES of its targets, the first one none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    share = torch.arange(SEQUENCES)[:, None] / SEQUENCES
    masked = torch.rand(SEQUENCES, LENGTH, generator=generator) >= share
    targets = tokens[:, 1:].masked_fill(masked, IGNORE)
    return {"inputs": tokens[:, :-1], "targets": targets, "draws": torch.arange(SEQUENCES)}


SHARDED: dict[str, Any] = {"gather": "param", "cpu_offload": False}
TENSOR: dict[str, Any] = {"tensor_parallel": 1, "sequence_parallel": False, "loss_parallel": False}
STRATEGIES: dict[str, tuple[type[Single], schema.Plugin]] = {
    "ddp": (DDP, schema.DDP(name="ddp", bucket_mb=1, bucket_view=True, static_graph=False)),
    "ddp static": (DDP, schema.DDP(name="ddp", bucket_mb=1, bucket_view=True, static_graph=True)),
    "ddp bf16 reduce": (DDP, schema.DDP(name="ddp", bucket_mb=1, bucket_view=True, static_graph=False)),
    "fsdp": (FSDP, schema.FSDP(name="fsdp", reshard_after_forward=True, **SHARDED, **TENSOR)),
    "fsdp whole": (FSDP, schema.FSDP(name="fsdp", reshard_after_forward=False, **SHARDED, **TENSOR)),
    "hsdp": (HSDP, schema.HSDP(name="hsdp", shard_size=2, reshard_after_forward=True, **SHARDED)),
}


def train(
    ranks: topology.Topology, name: str, micro_batch: int, dtype: torch.dtype, checkpointing: str
) -> dict[str, Any]:
    options = StepOptions(clip_norm=CLIP, activation_checkpointing=checkpointing, compile=False)
    made, config = STRATEGIES[name]
    precision = Precision(ranks.device, reduce="bf16" if "bf16 reduce" in name else "fp32")
    strategy = made(config, ranks, precision, Objective(), options)
    strategy.setup(factory(dtype), optimizer)
    losses, norms = [], []
    for step in range(2):
        mine = {name: tensor[ranks.dp_rank :: ranks.dp_size] for name, tensor in batch(step).items()}
        micro = [
            dict(zip(mine, parts, strict=True))
            for parts in zip(*(t.split(micro_batch) for t in mine.values()), strict=True)
        ]
        sums = strategy.train_step(micro)
        numbers = strategy.reduce({name: value.reshape(1) for name, value in sums.items()})
        losses.append(numbers["loss"][0] / numbers["count"][0])
        norms.append(strategy.update(LR).grad_norm.item())
    return {"losses": losses, "norms": norms, "weights": dict(strategy.full_weights())}


def main(out: Path, name: str, micro_batch: int, checkpointing: str) -> None:
    ranks = topology.join(timeout_s=60)
    dtypes = (torch.float64, torch.float32)
    trained = {str(dtype): train(ranks, name, micro_batch, dtype, checkpointing) for dtype in dtypes}
    if ranks.is_main:
        torch.save(trained, out)
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
