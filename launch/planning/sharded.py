"""What FSDP2 holds and sends: parameters in shards, layers gathered one by one; in groups of processes for hybrids."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from launch.planning.gpus import NODE
from launch.planning.memory import Accountant, Way
from launch.planning.memory_parts import MemoryParts, ParameterShare, Sent, shared
from launch.planning.planned_model import BuiltModel, PlannedModel
from launch.planning.trace import OUTSIDE
from trainer.precision import DTYPES
from trainer.strategies.fsdp import rounds_sums


class Sharded(Accountant):
    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs == 1:
            return
        yield ("strategy=fsdp",)
        if subject.precision.compute == "bf16" and subject.precision.param == "fp32":
            yield ("strategy=fsdp", "strategy.gather=compute")
        for split in subject.splits(min(NODE, procs)):
            yield ("strategy=fsdp", *split)

    @cached_property
    def traced(self) -> BuiltModel:
        """With weights in the compute data type, where they are gathered in it."""
        if self.strategy.gather == "param":
            return self.built
        return self.subject.split(self.strategy, self.layout.tensor, DTYPES[self.compute])

    @property
    def gathered(self) -> float:
        """How large parameters are as they are gathered, of what they are as they are held."""
        if self.strategy.gather == "param":
            return 1.0
        return DTYPES[self.compute].itemsize / DTYPES[self.config.precision.param].itemsize

    def shards(self) -> int:
        """Processes that a copy of each layer's parameters is sharded over."""
        return self.copies

    def sent(self, position: int) -> Iterator[Sent]:
        share, strategy = ParameterShare(self.built.parameters, self.shards()), self.strategy
        blocks = sum(share.of_block(number).padded for number in range(len(self.built.blocks)))
        often = share.padded + (blocks if strategy.reshard_after_forward else 0)
        n, near = share.shards, share.shards * self.layout.tensor
        gathered = round(shared(n) * often * self.gathered * self.passes)
        yield Sent("gathering of parameters", gathered, near, False)
        scattered = round(shared(n) * share.padded * self.reduced * self.often_reduced)
        yield Sent("scattering of gradients", scattered, near, False)

    @property
    def often_reduced(self) -> int:
        """How often in a step gradients are."""
        return self.passes if self.strategy.reduce == "each" else 1

    def moments(self, position: int) -> Iterator[MemoryParts]:
        """In the forward pass a layer is gathered, and what it was gathered into is let go of when the next one is; in
        the backward pass the one before is on its way already, and the gradients of the one behind are still being
        sent."""
        share, trace = ParameterShare(self.built.parameters, self.shards()), self.trace(casts_kept=False)
        strategy, gathered, reduced = self.strategy, self.gathered, self.reduced
        unit = [round(share.of_block(number).padded * gathered) for number in range(len(self.built.blocks))]
        sent = [round(share.of_block(number).padded * reduced) for number in range(len(self.built.blocks))]
        rest = round(share.of_block(OUTSIDE).padded * gathered)
        last, done = len(unit) - 1, 0
        held = share.parameter_bytes, 0 if self.passes == 1 else share.trained, share.state
        if strategy.cpu_offload:
            held = 0, 0, 0
        if strategy.reduce == "last" and self.passes > 1:  # whole, until the last micro-batch
            held = held[0], ParameterShare(self.built.parameters).trained, held[2]
        kept = 0 if strategy.reshard_after_forward else sum(unit)
        rest_gradients = 0  # of what is outside of blocks: whole until the pass is over
        for segment in trace.segments:
            here = segment.block
            if not segment.backward:
                around = 2 * unit[here] if here != OUTSIDE else (unit[last] if segment is trace.segments[-1] else 0)
                yield MemoryParts(*held[:3], segment.peak, rest + max(around, kept))
                continue
            tail = unit[last] if unit else 0  # what the last layer was gathered into, until the next forward pass
            if here == OUTSIDE:
                around = tail + (kept or (unit[last] if unit else 0))
                yield MemoryParts(
                    held[0], held[1] + done, held[2], segment.peak_with_gradients, rest + rest_gradients + around
                )
                rest_gradients += segment.gradients
                continue
            before = unit[here - 1] if here else 0
            behind = sent[here + 1] if here < last else 0
            around = max(kept, unit[here] + before) + behind + tail
            yield MemoryParts(
                held[0], held[1] + done, held[2], segment.peak_with_gradients, rest + rest_gradients + around
            )
            # Behind it: its gradients, and the buffer that they are sent from.
            around = max(kept, before) + sent[here] + segment.gradients + tail
            yield MemoryParts(held[0], held[1] + done, held[2], segment.end, rest + rest_gradients + around)
            if self.passes == 1 and not strategy.cpu_offload:
                done += share.of_block(here).trained
        tail = unit[last] if unit else 0
        yield MemoryParts(held[0], held[1] + done, held[2], 0, rest_gradients + round(rest_gradients * reduced) + tail)
        yield (
            MemoryParts()
            if strategy.cpu_offload
            else self.updated(share)._replace(buffers=self.updated(share).buffers + tail)
        )


class Hybrid(Sharded):
    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs > NODE and procs % NODE == 0:
            yield ("strategy=hsdp", f"strategy.shard_size={NODE}")

    def shards(self) -> int:
        return self.strategy.shard_size or min(NODE, self.procs)

    def sent(self, position: int) -> Iterator[Sent]:
        yield from super().sent(position)
        if (groups := self.copies // self.shards()) > 1:
            share = ParameterShare(self.built.parameters, self.shards())
            rounds = rounds_sums(self.subject.precision, self.strategy.gather)
            often = self.often_reduced if rounds else 1
            summed = round(2 * shared(groups) * share.trained * self.reduced * often)
            yield Sent("all-reduce between groups", summed, self.procs, False)
