"""What a process holds at the fullest moment of a step, part by part, and what it sends: computed from a trace of the
model, and from what its strategy keeps and gathers around it.

Strategies are modeled as in torch 2.13 (DDP's buckets, FSDP2's gathered layers and buffers) and DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

from launch.planning.gpus import NODE
from launch.planning.memory_parts import MemoryParts, ParameterShare, Transfer, ring_fraction
from launch.planning.planned_model import BuiltModel, PlannedModel
from launch.planning.trace import Trace
from trainer.config import Config
from trainer.data.deal import Deal
from trainer.precision import DTYPES
from trainer.registry import load
from trainer.strategies.leafwise.sum_tree import SumTree

Way = Sequence[str]  # overrides of a strategy


def accountant(subject: PlannedModel, config: Config, procs: int) -> Accountant:
    """Returns the accountant of the config's strategy."""
    accountant_class: type[Accountant] = load(config.strategy.accountant)
    if procs == 1 and not accountant_class.counts_single_process:
        accountant_class = Accountant
    return accountant_class(subject, config, procs)


class Accountant:
    """Computes memory and traffic of a config. A process works on `rows` sequences at a time, `passes` times a step.

    This class is for a strategy whose processes each hold the whole model; subclasses are for others. A strategy's
    section names its class (`trainer.config.strategy.Strategy.accountant`).
    """

    counts_single_process: ClassVar[bool] = False
    """Whether the accountant also applies to a single process."""

    def __init__(self, subject: PlannedModel, config: Config, procs: int):
        self.subject, self.config, self.procs = subject, config, procs
        self.strategy: Any = config.strategy
        self.layout = config.layout(procs)
        self.replicas = procs // self.layout.processes
        share = max(1, config.train.global_batch // self.replicas)
        self.rows = min(config.train.micro_batch or share, share)
        self.passes = -(-share // self.rows)
        self.checkpointing = config.train.activation_checkpointing

    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        """Yields overrides of the strategy that are worth trying with that many processes, the most common first."""
        return iter(())

    # What a strategy overrides

    def moments(self, position: int) -> Iterator[MemoryParts]:
        """Yields what the process at this pipeline position (any process without a pipeline) holds in the course of a
        step."""
        share = ParameterShare(self.model.parameters)
        yield from single_process_moments(self.trace(), share, self.passes)
        yield self.update_moment(share)

    def transfers(self, position: int) -> Iterator[Transfer]:
        """Yields what that process sends in a step to all but those that share its layers' matrices."""
        gradients = ParameterShare(self.model.parameters).trained_bytes
        nbytes = round(2 * ring_fraction(self.replicas) * gradients * self.reduce_ratio)
        yield Transfer("all-reduce of gradients", nbytes, self.replicas, False)

    def bytes_within_layers(self, position: int) -> int:
        """Returns the bytes that it sends in a step to those that share its layers' matrices."""
        return self.trace().collective_bytes * self.passes if self.layout.tensor > 1 else 0

    def flops(self, position: int = 0) -> int:
        """Returns the FLOPs of a process in a step, recomputation included; of shared layers its share."""
        return self.trace().flops * self.passes

    def micro_batches(self) -> tuple[int, int]:
        """Returns into how many micro-batches the strategy cuts each of the loop's, and the sequences of each."""
        return 1, self.rows

    def bubble_factor(self) -> float:
        """Returns how many times longer a step takes than its computing, because of pipeline bubbles."""
        return 1.0

    def details(self) -> Iterator[tuple[str, str]]:
        """Yields (title, text) of the plan's lines about how the model is divided."""
        return iter(())

    # What all strategies share

    @cached_property
    def model(self) -> BuiltModel:
        return self.subject.split(self.strategy, self.layout.tensor)

    @property
    def traced_model(self) -> BuiltModel:
        """Returns the model that is traced."""
        return self.model

    def peak(self, position: int = 0) -> MemoryParts:
        """Returns the fullest moment of the process at this position."""
        fullest = max(self.moments(position), key=lambda parts: parts.total)
        return fullest._replace(buffers=fullest.buffers + self.leaf_sums_bytes(position))

    def leaf_sums_bytes(self, position: int) -> int:
        """Returns the bytes of sums of gradients that are kept besides the gradients, under
        `train.deterministic=topology`."""
        if not self.leafwise:
            return 0
        most = most_leaf_sums(self.config, self.replicas, min(NODE, self.procs))
        return (most - 1) * self.gradient_share(position).trained_bytes

    def gradient_share(self, position: int) -> ParameterShare:
        """Returns the parameters whose summed gradients the process at this position holds."""
        return ParameterShare(self.model.parameters)

    @property
    def leafwise(self) -> bool:
        return self.config.train.deterministic == "topology"

    def peaks(self) -> list[MemoryParts]:
        """Returns the peak of each position in the pipeline."""
        return [self.peak(position) for position in range(self.layout.stages)]

    def traffic(self, position: int = 0) -> list[Transfer]:
        """Returns what a process sends in a step, the least that each collective needs (rings)."""
        if self.procs == 1:
            return []
        transfers = list(self.transfers(position))
        if nbytes := self.bytes_within_layers(position):
            tensor = self.layout.tensor
            transfers.append(Transfer("within layers", round(nbytes * ring_fraction(tensor)), tensor, True))
        return transfers

    def trace(self, released: bool = False, casts_kept: bool = True) -> Trace:
        return self.traced_model.trace_model(self.rows, self.checkpointing, released, casts_kept)

    def update_moment(self, share: ParameterShare, offloaded: bool = False) -> MemoryParts:
        """Returns what a process holds while the optimizer steps."""
        total = sum(parameter.nbytes for parameter in self.subject.whole.parameters)
        temporary = 0 if offloaded else round(self.subject.state[1] * share.parameter_bytes / max(1, total))
        return MemoryParts(share.parameter_bytes, share.trained_bytes, share.state_bytes, 0, temporary)

    @property
    def compute(self) -> str:
        return "bf16" if self.subject.precision.compute == "fp8" else self.subject.precision.compute

    @property
    def reduce_ratio(self) -> float:
        """Returns the size of gradients when they are reduced, relative to when they are stored."""
        precision = self.config.precision
        return DTYPES[precision.reduce].itemsize / DTYPES[precision.param].itemsize


class Single(Accountant):
    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs == 1:
            yield ("strategy=single",)


def single_process_moments(trace: Trace, share: ParameterShare, passes: int) -> Iterator[MemoryParts]:
    """Yields the moments of a model on one process, without the update."""
    gradients = 0
    for segment in trace.segments:
        yield MemoryParts(share.parameter_bytes, gradients, share.state_bytes, segment.peak_with_gradients, 0)
        gradients += segment.gradients
    for segment in trace.segments if passes > 1 else ():
        yield MemoryParts(share.parameter_bytes, share.trained_bytes, share.state_bytes, segment.peak, 0)


def most_leaf_sums(config: Config, replicas: int, local_size: int) -> int:
    """Returns how many sums over leaves a process keeps at most in a step, of which one is the gradient."""
    deal, most = Deal.of(config, replicas, local_size), 1
    count = deal.count(config.train.global_batch)
    for first in range(0, replicas, deal.neighbors):  # each group sums up its leaves together
        tree = SumTree(count)
        together = [deal.leaves_of(count, first + i, replicas) for i in range(deal.neighbors)]
        for number, leaves in enumerate(zip(*together, strict=False), 1):
            for leaf in leaves:
                tree.add((leaf, leaf + 1), ())
            most = max(most, len(tree.sums) + (number < len(together[0])))  # and the next gradient
    return most
