"""What contradicts `train.deterministic=topology`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.strategy import strategy_of

KEY = "train.deterministic=topology"


def problems(train: Any, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
    """Yields why the bits of a run would depend on its processes."""
    if train.micro_batch is None:
        size = train.global_batch // world_size or 1
        what = "the sequences of one forward pass must be the same on any number of processes"
        yield f"{KEY}: needs train.micro_batch: {what}; nearest: train.micro_batch={size}"
    if train.compile:
        what = "compiled layers add up as the strategy and the machine let the compiler choose"
        yield f"train.compile=true: not with {KEY}: {what}; nearest: train.compile=false"
    strategy = strategy_of(sections)
    if reason := strategy.not_leafwise():
        yield f"{KEY}: {reason}"
    if precision := sections.get("precision"):
        if precision.reduce != precision.param:
            what = "gradients that stay on one process are not rounded"
            near = f"precision.reduce={precision.param}"
            yield f"precision.reduce={precision.reduce}: not with {KEY}: {what}; nearest: {near}"
        if precision.compute == "fp8":
            what = "its scales are those of what a process computes"
            yield f"precision.compute=fp8: not with {KEY}: {what}; nearest: precision=bf16"
    if (optimizer := sections.get("optimizer")) and (reason := getattr(optimizer, "not_elementwise", str)()):
        yield f"{KEY}: {reason}"
