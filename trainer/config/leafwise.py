"""What contradicts `train.deterministic=topology`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.strategy import strategy_of
from trainer.config.words import divisor

KEY = "train.deterministic=topology"


def problems(train: Any, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
    """Yields why the bits of a run would depend on its processes."""
    if train.micro_batch is None:
        replicas = max(1, world_size // strategy_of(sections).layout(world_size).processes)
        size = divisor(max(1, train.global_batch // replicas), 4)
        what = "which sequences are computed together must not depend on the number of processes"
        yield f"{KEY}: needs train.micro_batch: {what}; nearest: train.micro_batch={size}"
    if train.compile:
        what = "the compiler chooses an order of sums for each strategy and machine"
        yield f"train.compile=true: not with {KEY}: {what}; nearest: train.compile=false"
    strategy = strategy_of(sections)
    if reason := strategy.why_not_leafwise():
        yield f"{KEY}: {reason}"
    if precision := sections.get("precision"):
        if precision.reduce != precision.param:
            what = "gradients that stay on one process are not rounded"
            near = f"precision.reduce={precision.param}"
            yield f"precision.reduce={precision.reduce}: not with {KEY}: {what}; nearest: {near}"
        if precision.compute == "fp8":
            what = "its scales are those of what a process computes"
            yield f"precision.compute=fp8: not with {KEY}: {what}; nearest: precision=bf16"
    optimizer = sections.get("optimizer")
    if optimizer and not (hasattr(optimizer, "elementwise") and optimizer.elementwise()):
        implementation = getattr(optimizer, "implementation", None)
        key = f"optimizer.implementation={implementation}" if implementation else f"optimizer={optimizer.name}"
        what = "its step on an element may depend on how parameters are sharded"
        near = "optimizer.implementation=foreach" if implementation else "optimizer=adamw"
        yield f"{key}: not with {KEY}: {what}; nearest: {near}"
