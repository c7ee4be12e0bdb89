"""The order in which a process of a pipeline works on its micro-batches, as in torch's schedules."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from trainer.config.pipeline_schedules import SCHEDULES
from trainer.config.strategy import Pipeline
from trainer.strategies.stages import pp_rank_of_stage


class Work(NamedTuple):
    kind: str
    """F: forward; B: backward; I, W: the backward pass of inputs, of weights alone."""
    stage: int
    number: int
    """Number of the micro-batch."""


def order(config: Pipeline, processes: int, position: int, count: int) -> Iterator[Work]:
    """Yields what the process at this pipeline position does with `count` micro-batches, in order."""
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
        for sub_action in action.sub_actions:
            yield from _works(sub_action)
        return
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    if action.computation_type.name in kinds:
        yield Work(kinds[action.computation_type.name], action.stage_index, action.microbatch_index)


def _actions(config: Pipeline, processes: int, position: int, count: int) -> list[Any]:
    """Returns the actions of torch's own schedule class, which is given stages without modules."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    num_stages = processes * config.stages_per_rank
    stages = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=num_stages,
            group_size=processes,
            group_rank=position,
            is_first=stage == 0,
            is_last=stage == num_stages - 1,
            submod=None,
            has_backward=True,
        )
        for stage in range(num_stages)
        if pp_rank_of_stage(config, processes, stage) == position
    ]
    schedule_class: Any = get_schedule_class(SCHEDULES[config.schedule].torch_name)
    return schedule_class(stages, count, loss_fn=lambda *_: None, scale_grads=False).pipeline_order[position]
