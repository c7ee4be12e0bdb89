"""What a process holds at the fullest moment of a step, part by part, and what it sends: from a trace of the model, and
from what its strategy keeps and gathers around it.

How strategies do that is as torch 2.13 (DDP's buckets, FSDP2's gathered layers and buffers) and DeepSpeed 0.19 do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

from launch.planning.memory_parts import MemoryParts, ParameterShare, Sent, shared
from launch.planning.planned_model import BuiltModel, PlannedModel
from launch.planning.trace import Trace
from trainer.config import Config
from trainer.precision import DTYPES
from trainer.registry import load

Way = Sequence[str]  # overrides of a strategy


def accountant(subject: PlannedModel, config: Config, procs: int) -> Accountant:
    """Who counts for the config's strategy."""
    kind: type[Accountant] = load(config.strategy.accountant)
    return (kind if procs > 1 or kind.alone else Accountant)(subject, config, procs)


class Accountant:
    """Memory of a config on a number of processes; each works on `rows` sequences at a time, `passes` times a step.

    This one is for a strategy whose processes each hold the whole model; subclasses are for others. A strategy's
    section says which one is its own (`trainer.config.strategy.Strategy.accountant`).
    """

    alone: ClassVar[bool] = False
    """Whether the strategy does on one process, too, what the accountant knows of."""

    def __init__(self, subject: PlannedModel, config: Config, procs: int):
        self.subject, self.config, self.procs = subject, config, procs
        self.strategy: Any = config.strategy
        self.layout = config.layout(procs)
        self.copies = procs // self.layout.processes
        share = max(1, config.train.global_batch // self.copies)
        self.rows = min(config.train.micro_batch or share, share)
        self.passes = -(-share // self.rows)
        self.checkpointing = config.train.activation_checkpointing

    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        """Yields the strategy's keys that are worth a try with that many processes, the most usual first."""
        return iter(())

    # What a strategy overrides

    def moments(self, position: int) -> Iterator[MemoryParts]:
        """What the process at this place of a pipeline (any process, where there is none) holds in the course of a
        step."""
        share = ParameterShare(self.built.parameters)
        yield from alone(self.trace(), share, self.passes)
        yield self.updated(share)

    def sent(self, position: int) -> Iterator[Sent]:
        """What that process sends in a step to others than those that share its layers' matrices."""
        summed = round(2 * shared(self.copies) * ParameterShare(self.built.parameters).trained * self.reduced)
        yield Sent("all-reduce of gradients", summed, self.copies, False)

    def within(self, position: int) -> int:
        """Bytes that it sends in a step to those that share its layers' matrices."""
        return self.trace().sent * self.passes if self.layout.tensor > 1 else 0

    def flops(self, position: int = 0) -> int:
        """Operations of a process in a step, recomputation among them. Of layers that several share: its part."""
        return self.trace().flops * self.passes

    def micro_batches(self) -> tuple[int, int]:
        """Into how many pieces each of the loop's micro-batches is cut, and sequences of each."""
        return 1, self.rows

    def waiting(self) -> float:
        """How many times longer a step takes than its computing, as processes wait for what others compute."""
        return 1.0

    def details(self) -> Iterator[tuple[str, str]]:
        """Yields (title, text) of lines for the plan of how the model is divided."""
        return iter(())

    # What is the same for all

    @cached_property
    def built(self) -> BuiltModel:
        return self.subject.split(self.strategy, self.layout.tensor)

    @property
    def traced(self) -> BuiltModel:
        """What computes."""
        return self.built

    def peak(self, position: int = 0) -> MemoryParts:
        """The fullest moment of the process at this place."""
        return max(self.moments(position), key=lambda parts: parts.total)

    def peaks(self) -> list[MemoryParts]:
        """Returns the peak of each position in the pipeline."""
        return [self.peak(position) for position in range(self.layout.stages)]

    def traffic(self, position: int = 0) -> list[Sent]:
        """What a process sends in a step, at the least that each collective can do with (rings)."""
        if self.procs == 1:
            return []
        sent = list(self.sent(position))
        if within := self.within(position):
            tensor = self.layout.tensor
            sent.append(Sent("within layers", round(within * shared(tensor)), tensor, True))
        return sent

    def trace(self, released: bool = False, casts_kept: bool = True) -> Trace:
        return self.traced.whole(self.rows, self.checkpointing, released, casts_kept)

    def updated(self, share: ParameterShare, offloaded: bool = False) -> MemoryParts:
        """While the optimizer steps."""
        whole = sum(parameter.nbytes for parameter in self.subject.whole.parameters)
        besides = 0 if offloaded else round(self.subject.state[1] * share.parameter_bytes / max(1, whole))
        return MemoryParts(share.parameter_bytes, share.trained, share.state, 0, besides)

    @property
    def compute(self) -> str:
        return "bf16" if self.subject.precision.compute == "fp8" else self.subject.precision.compute

    @property
    def reduced(self) -> float:
        """How large gradients are as they are sent, of what they are as they are held."""
        precision = self.config.precision
        return DTYPES[precision.reduce].itemsize / DTYPES[precision.param].itemsize


class Single(Accountant):
    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs == 1:
            yield ("strategy=single",)


def alone(trace: Trace, share: ParameterShare, passes: int) -> Iterator[MemoryParts]:
    """A model on one process, without the update."""
    before = 0
    for segment in trace.segments:
        yield MemoryParts(share.parameter_bytes, before, share.state, segment.peak_with_gradients, 0)
        before += segment.gradients
    for segment in trace.segments if passes > 1 else ():
        yield MemoryParts(share.parameter_bytes, share.trained, share.state, segment.peak, 0)
