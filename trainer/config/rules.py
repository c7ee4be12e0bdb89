"""Contradictions between keys, each with the arithmetic and the way out. Runs on whatever sections are valid so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.schema import GPT, Section, Train


def problems(sections: Mapping[str, Section], world_size: int) -> Iterator[str]:
    """Every contradiction of the config on `world_size` processes."""
    has: dict[str, Any] = dict(sections)
    if train := has.get("train"):
        yield from _batch(train, world_size)
    if isinstance(model := has.get("model"), GPT):
        yield from _gpt(model)
    if (strategy := has.get("strategy")) and strategy.name == "single" and world_size > 1:
        yield f"strategy=single: runs one process, but {world_size} were started; use strategy=ddp"


def _batch(train: Train, world_size: int) -> Iterator[str]:
    if train.micro_batch is None:
        if train.global_batch % world_size:
            near = _nearest(train.global_batch, world_size)
            yield f"train.global_batch={train.global_batch}: does not divide by {world_size} processes; nearest: {near}"
        return
    unit = train.micro_batch * world_size
    if train.global_batch % unit:
        yield (
            f"train.global_batch={train.global_batch}: is no multiple of "
            f"{world_size} processes x train.micro_batch={train.micro_batch} = {unit}; "
            f"nearest: {_nearest(train.global_batch, unit)}"
        )


def _gpt(model: GPT) -> Iterator[str]:
    if model.width % model.heads:
        near = _nearest(model.width, model.heads)
        yield f"model.width={model.width}: does not divide by model.heads={model.heads}; nearest: {near}"
    elif model.positions == "rotary" and (model.width // model.heads) % 2:
        size = model.width // model.heads
        yield f"model.positions=rotary: needs an even head size, but width {model.width} / heads {model.heads} = {size}"


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"
