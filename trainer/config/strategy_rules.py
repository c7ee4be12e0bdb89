"""Contradictions of a strategy with the number of processes, the model, the batch and the precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.pipelines import SCHEDULES, allowed_micro_batches
from trainer.config.schema import GPT, AdamW, Train
from trainer.config.strategy import (
    FSDP,
    HSDP,
    WHOLE,
    Layout,
    Pipeline,
    Precision,
    Sharded,
    Strategy,
    TensorParallel,
    Zero,
)


def layout_of(strategy: Any, world_size: int) -> Layout:
    """How it uses that many processes; as if it were one copy a process where it cannot."""
    layout = strategy.layout(world_size) if isinstance(strategy, Strategy) else WHOLE
    return layout if world_size % layout.processes == 0 else WHOLE


def problems(has: Mapping[str, Any], world_size: int) -> Iterator[str]:
    """`has`: the sections that are valid so far."""
    strategy = has["strategy"]
    if strategy.name == "single" and world_size > 1:
        yield f"strategy=single: runs one process, but {world_size} were started; use strategy=ddp"
    if isinstance(strategy, HSDP) and strategy.shard_size and world_size % strategy.shard_size:
        yield (
            f"strategy.shard_size={strategy.shard_size}: does not divide {world_size} processes into groups; "
            f"nearest: {_divisor(world_size, strategy.shard_size)}"
        )
    if isinstance(optimizer := has.get("optimizer"), AdamW) and isinstance(strategy, Strategy):
        yield from _implementation(optimizer, strategy)
    if isinstance(strategy, TensorParallel):
        yield from _tensor_parallel(strategy, has, world_size)
    if isinstance(strategy, Pipeline):
        yield from _pipeline(strategy, has, world_size)
    if isinstance(strategy, Zero):
        yield from _zero(strategy, has)
    precision = has.get("precision")
    if isinstance(precision, Precision) and precision.param == "bf16" and precision.compute in ("fp32", "fp16"):
        yield (
            f"precision.compute={precision.compute}: weights that are held in bf16 (precision.param) are computed with "
            "in bf16 or fp8; nearest: precision.compute=bf16"
        )
    if isinstance(strategy, Sharded) and isinstance(precision, Precision):
        yield from _kept_gradients(strategy, precision)
    if getattr(strategy, "gather", "") == "compute" and getattr(precision, "compute", "") == "fp16":
        yield "strategy.gather=compute: not with precision.compute=fp16, whose range weights may leave; nearest: param"


def _kept_gradients(strategy: Sharded, precision: Precision) -> Iterator[str]:
    shorter = strategy.gather == "compute" and precision.compute != "fp32"  # auto may become bf16
    sent_short = precision.param == "fp32" and (shorter or precision.reduce == "bf16")
    if strategy.reduce == "last" and sent_short:
        yield (
            "strategy.reduce=last: not where gradients are sent in bf16 but held in fp32 (precision.reduce=bf16, or "
            "strategy.gather=compute): the sum over micro-batches would be rounded to bf16; nearest: "
            "strategy.reduce=each"
        )


def _tensor_parallel(strategy: TensorParallel, has: Mapping[str, Any], world_size: int) -> Iterator[str]:
    size, key = strategy.tensor_parallel, f"strategy.tensor_parallel={strategy.tensor_parallel}"
    if world_size % size:
        yield f"{key}: does not divide {world_size} processes; nearest: {_divisor(world_size, size)}"
    if isinstance(strategy, FSDP) and strategy.cpu_offload and size > 1:
        yield f"{key}: does not go with strategy.cpu_offload=true; nearest: strategy.tensor_parallel=1"
    model, data = has.get("model"), has.get("data")
    if size > 1 and getattr(has.get("precision"), "compute", "") == "fp8":
        yield f"{key}: does not go with precision.compute=fp8; nearest: precision=bf16"
    if size > 1 and isinstance(model, GPT) and model.fused_norm:
        yield f"{key}: does not go with Apex's norms; nearest: model.fused_norm=false"
    if isinstance(model, GPT) and model.heads % size:
        yield f"{key}: does not divide model.heads={model.heads}; nearest: {_divisor(model.heads, size)}"
    if not strategy.sequence_parallel or size == 1:
        return
    if isinstance(model, GPT) and model.dropout:
        yield (
            f"strategy.sequence_parallel=true: needs model.dropout=0 (now {model.dropout:g}): a process that holds a "
            "part of a sequence cannot draw the mask of all of it; nearest: strategy.sequence_parallel=false"
        )
    if (length := getattr(data, "sequence_length", None)) and length % size:
        near = f"{length // size * size or size} or {(length // size + 1) * size}"
        yield f"data.sequence_length={length}: does not divide by {key} for strategy.sequence_parallel; nearest: {near}"


def _pipeline(strategy: Pipeline, has: Mapping[str, Any], world_size: int) -> Iterator[str]:
    schedule, name = SCHEDULES[strategy.schedule], f"strategy.schedule={strategy.schedule}"
    layout, parts = strategy.layout(world_size), strategy.parts_a_process
    if world_size % layout.processes:
        what = f"strategy.stages={layout.stages}"
        what += f" x strategy.tensor_parallel={layout.tensor} = {layout.processes}" if layout.tensor > 1 else ""
        near = _divisor(world_size // layout.tensor, layout.stages) if world_size % layout.tensor == 0 else "null"
        yield f"{what}: does not divide {world_size} processes; nearest: strategy.stages={near}"
        return
    if (schedule.parts and parts != schedule.parts) or (not schedule.parts and parts == 1):
        need = f"holds {schedule.parts} part{'s' * (schedule.parts > 1)}" if schedule.parts else "holds 2 parts or more"
        yield f"strategy.virtual_stages={parts}: with {name} a process {need}; nearest: {schedule.parts or 2}"
        return
    model, count = has.get("model"), layout.stages * parts
    if isinstance(model, GPT) and model.layers < count and world_size > 1:
        fewer = model.layers // parts
        yield (
            f"model.layers={model.layers}: cannot be cut into {layout.stages} processes x {parts} parts = {count}; "
            f"nearest: model.layers={count}, or strategy.{f'stages={fewer}' if fewer else 'schedule=1f1b'}"
        )
    together, copies = schedule.v_shaped or layout.stages == 1, world_size // layout.processes
    if isinstance(model, GPT) and strategy.data_parallel == "fsdp" and copies > 1 and together:
        what = f"the two ends of the model, whose embedding is tied, are on one process with {name}"
        what += f" on {layout.stages} processes" if not schedule.v_shaped else ""
        yield f"strategy.data_parallel=fsdp: {what}; nearest: strategy.data_parallel=ddp"
    if strategy.micro_batches and world_size > 1:
        n = strategy.micro_batches
        allowed = allowed_micro_batches(strategy, layout.stages, 2 * n + 4 * count)
        if n not in allowed:
            nearest = min(allowed, key=lambda other: (abs(other - n), other))
            yield (
                f"strategy.micro_batches={n}: not with {name} on {layout.stages} processes ({count} parts); "
                f"nearest: {nearest}"
            )
    train = has.get("train")
    if isinstance(train, Train) and train.compile and schedule.splits_backward:
        yield (
            f"train.compile=true: not with {name}, which computes the gradients of weights apart from those of "
            "activations; nearest: strategy.schedule=interleaved_1f1b"
        )


def _zero(strategy: Zero, has: Mapping[str, Any]) -> Iterator[str]:
    if strategy.offload_optimizer and strategy.stage == 0:
        yield (
            "strategy.offload_optimizer=true: stage 0 steps on the weights that it computes with; nearest: "
            "strategy.stage=1"
        )
    if strategy.offload_parameters and strategy.stage < 3:
        what = f"strategy.stage={strategy.stage} computes with all of them all the time"
        yield f"strategy.offload_parameters=true: {what}; nearest: strategy.stage=3"
    if strategy.stage and getattr(has.get("optimizer"), "name", "") == "muon":
        yield (
            f"optimizer=muon: needs whole matrices, and DeepSpeed's stage {strategy.stage} steps on one flat piece of "
            "all parameters; nearest: strategy=fsdp"
        )
    if strategy.stage == 3 and getattr(has.get("train"), "compile", False):
        what = "the compiler cannot look through DeepSpeed's gathering of parameters inside of layers"
        yield f"train.compile=true: not with strategy.stage=3: {what}; nearest: strategy.stage=2"
    precision = has.get("precision")
    if isinstance(precision, Precision):
        if precision.compute in ("fp16", "fp8"):
            yield f"precision.compute={precision.compute}: not with strategy=zero; nearest: precision=bf16"
        if precision.param != "fp32":
            what = "DeepSpeed keeps weights in fp32 here"
            yield f"precision.param={precision.param}: {what}; nearest: precision.param=fp32"


def _implementation(optimizer: AdamW, strategy: Strategy) -> Iterator[str]:
    able = {"apex": ("single", "ddp"), "8bit": ("single", "ddp", "fsdp", "hsdp")}.get(optimizer.implementation)
    if able and strategy.name not in able:
        yield (
            f"optimizer.implementation={optimizer.implementation}: works with strategy={', '.join(able)}, not with "
            f"{strategy.name}; nearest: optimizer.implementation=fused"
        )


def _divisor(of: int, at_most: int) -> int:
    return max(size for size in range(1, of + 1) if of % size == 0 and size <= max(1, at_most))
