"""Where a run can be: what the any-to-any matrix saves under and goes on under."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.runs import TINY

SAVED_AT, STEPS = 20, 40
COMMON = (
    *TINY,
    "model.layers=4",
    "train.clip_norm=0.5",
    f"train.steps={STEPS}",
    f"checkpoint.every={SAVED_AT}",
    "optimizer.lr=0.001",
    "train.log_every=5",
    "eval.every=0",
    "track.console=false",
    "track.wandb.mode=disabled",
)  # fmt: skip; at twice the rate the gradient of step 33 turns differences of 1e-7 into 5e-4, for any strategy


@dataclass(frozen=True)
class Cell:
    """`anywhere`: one of the matrix's rows and columns; else it is only resumed where it was, to the bit."""

    name: str
    processes: int
    overrides: tuple[str, ...]
    anywhere: bool = True

    @property
    def folder(self) -> str:
        return f"{self.name.replace(' ', '-')}-on-{self.processes}"


def cells() -> Iterator[Cell]:
    yield Cell("single", 1, ("strategy=single",))
    pipeline = ("strategy=pipeline", "train.micro_batch=6")
    for n in (2, 3, 4):
        yield Cell("ddp", n, ("strategy=ddp",), anywhere=n < 4)
        yield Cell("fsdp", n, ("strategy=fsdp",), anywhere=n != 3)
        for stage in (1, 2, 3):
            zero = ("strategy=zero", f"strategy.stage={stage}")
            yield Cell(f"zero {stage}", n, zero, anywhere=n == 2)
        yield Cell("pipeline", n, pipeline, anywhere=n == 2)
    yield Cell("hsdp 2 x 2", 4, ("strategy=hsdp", "strategy.shard_size=2"))
    for inner in ("ddp", "fsdp"):
        cut = (*pipeline, "strategy.stages=2", f"strategy.data_parallel={inner}")
        yield Cell(f"pipeline 2 x {inner} 2", 4, cut)
    tensor = ("strategy=fsdp", "strategy.tensor_parallel=2")
    yield Cell("tensor 2 x fsdp 2", 4, tensor, anywhere=False)
