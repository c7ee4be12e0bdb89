"""In which order a process of a pipeline works on its micro-batches: that of torch's schedules."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from trainer.config.pipeline_schedules import SCHEDULES
from trainer.config.strategy import Pipeline
from trainer.strategies.stages import stage_of


class Work(NamedTuple):
    kind: str
    """F: forward; B: backward; I, W: the backward pass of inputs, of weights alone."""
    part: int
    number: int
    """Number of the micro-batch."""


def order(config: Pipeline, processes: int, position: int, count: int) -> Iterator[Work]:
    """What the process at that place does with `count` micro-batches, in order."""
    if config.schedule in ("gpipe", "1f1b"):
        first = count if config.schedule == "gpipe" else min(count, processes - position)
        yield from (Work("F", position, number) for number in range(first))
        for number in range(count):
            yield Work("B", position, number)
            if first + number < count:
                yield Work("F", position, first + number)
        return
    yield from (work for action in _actions(config, processes, position, count) for work in _works(action))


def _works(action: Any) -> Iterator[Work]:
    if action is None:
        return
    if action.sub_actions:  # a forward and a backward that overlap
        for part in action.sub_actions:
            yield from _works(part)
        return
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    if action.computation_type.name in kinds:
        yield Work(kinds[action.computation_type.name], action.stage_index, action.microbatch_index)


def _actions(config: Pipeline, processes: int, position: int, count: int) -> list[Any]:
    """Returns the actions of torch's own schedule class, which is given stages without modules."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    parts = processes * config.stages_per_rank
    stages = [
        SimpleNamespace(
            stage_index=part,
            num_stages=parts,
            group_size=processes,
            group_rank=position,
            is_first=part == 0,
            is_last=part == parts - 1,
            submod=None,
            has_backward=True,
        )
        for part in range(parts)
        if stage_of(config, processes, part) == position
    ]
    make: Any = get_schedule_class(SCHEDULES[config.schedule].torch_name)
    return make(stages, count, loss_fn=lambda *_: None, scale_grads=False).pipeline_order[position]
