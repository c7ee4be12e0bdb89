"""What FSDP2 holds and sends: parameters in shards, layers gathered one by one; in groups of processes for hybrids."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from launch.planning.gpus import NODE
from launch.planning.memory import Accountant, Way
from launch.planning.memory_parts import MemoryParts, ParameterShare, Transfer, ring_fraction
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
    def traced_model(self) -> BuiltModel:
        """Returns the model with weights in the compute data type, if they are gathered in it."""
        if self.strategy.gather == "param":
            return self.model
        return self.subject.split(self.strategy, self.layout.tensor, DTYPES[self.compute])

    @property
    def gather_ratio(self) -> float:
        """Returns the size of parameters when they are gathered, relative to when they are stored."""
        if self.strategy.gather == "param":
            return 1.0
        return DTYPES[self.compute].itemsize / DTYPES[self.config.precision.param].itemsize

    def shards(self) -> int:
        """Returns the number of processes that each layer's parameters are sharded over."""
        return self.replicas

    def transfers(self, position: int) -> Iterator[Transfer]:
        share, strategy = ParameterShare(self.model.parameters, self.shards()), self.strategy
        block_bytes = sum(share.of_block(number).padded_bytes for number in range(len(self.model.blocks)))
        gathered_bytes = share.padded_bytes + (block_bytes if strategy.reshard_after_forward else 0)
        n, processes = share.shards, share.shards * self.layout.tensor
        gathered = round(ring_fraction(n) * gathered_bytes * self.gather_ratio * self.passes)
        yield Transfer("gathering of parameters", gathered, processes, False)
        scattered = round(ring_fraction(n) * share.padded_bytes * self.reduce_ratio * self.reductions)
        yield Transfer("scattering of gradients", scattered, processes, False)

    def gradient_share(self, position: int) -> ParameterShare:
        return ParameterShare(self.model.parameters, self.shards())

    @property
    def reductions(self) -> int:
        """Returns how often gradients are reduced in a step."""
        return self.passes if self.strategy.reduce == "each" or self.leafwise else 1

    def moments(self, position: int) -> Iterator[MemoryParts]:
        """Yields the moments of a step. In the forward pass a layer's buffer is freed when the next layer is gathered;
        in the backward pass the next layer is already being gathered while gradients of the last one are still sent."""
        share, trace = ParameterShare(self.model.parameters, self.shards()), self.trace(casts_kept=False)
        strategy, blocks = self.strategy, range(len(self.model.blocks))
        gathered = [round(share.of_block(number).padded_bytes * self.gather_ratio) for number in blocks]
        reduced = [round(share.of_block(number).padded_bytes * self.reduce_ratio) for number in blocks]
        outside = round(share.of_block(OUTSIDE).padded_bytes * self.gather_ratio)
        last, done = len(gathered) - 1, 0
        weights, gradients, state = share.parameter_bytes, share.trained_bytes, share.state_bytes
        if self.passes == 1:
            gradients = 0
        if strategy.cpu_offload:
            weights = gradients = state = 0
        if strategy.reduce == "last" and self.passes > 1 and not self.leafwise:  # whole, until the last micro-batch
            gradients = ParameterShare(self.model.parameters).trained_bytes
        unsharded = 0 if strategy.reshard_after_forward else sum(gathered)
        outside_gradients = 0  # of parameters outside of blocks: whole until the pass is over
        for segment in trace.segments:
            block = segment.block
            if not segment.backward:
                at_end = gathered[last] if segment is trace.segments[-1] else 0
                buffers = 2 * gathered[block] if block != OUTSIDE else at_end
                yield MemoryParts(weights, gradients, state, segment.peak, outside + max(buffers, unsharded))
                continue
            tail = gathered[last] if gathered else 0  # the buffer of the last layer, until the next forward pass
            if block == OUTSIDE:
                buffers = outside + outside_gradients + tail + (unsharded or (gathered[last] if gathered else 0))
                yield MemoryParts(weights, gradients + done, state, segment.peak_with_gradients, buffers)
                outside_gradients += segment.gradients
                continue
            next_gathered = gathered[block - 1] if block else 0
            sending = reduced[block + 1] if block < last else 0
            always = outside + outside_gradients + tail
            buffers = always + max(unsharded, gathered[block] + next_gathered) + sending
            yield MemoryParts(weights, gradients + done, state, segment.peak_with_gradients, buffers)
            # After the block: its gradients, and the buffer that they are sent from.
            buffers = always + max(unsharded, next_gathered) + reduced[block] + segment.gradients
            yield MemoryParts(weights, gradients + done, state, segment.end, buffers)
            if self.passes == 1 and not strategy.cpu_offload:
                done += share.of_block(block).trained_bytes
        tail = gathered[last] if gathered else 0
        buffers = outside_gradients + round(outside_gradients * self.reduce_ratio) + tail
        yield MemoryParts(weights, gradients + done, state, 0, buffers)
        yield (
            MemoryParts()
            if strategy.cpu_offload
            else self.update_moment(share)._replace(buffers=self.update_moment(share).buffers + tail)
        )


class Hybrid(Sharded):
    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs > NODE and procs % NODE == 0:
            yield ("strategy=hsdp", f"strategy.shard_size={NODE}")

    def shards(self) -> int:
        return self.strategy.shard_size or min(NODE, self.procs)

    def transfers(self, position: int) -> Iterator[Transfer]:
        yield from super().transfers(position)
        if (groups := self.replicas // self.shards()) > 1:
            share = ParameterShare(self.model.parameters, self.shards())
            rounds = rounds_sums(self.subject.precision, self.strategy.gather)
            reductions = self.reductions if rounds else 1
            nbytes = round(2 * ring_fraction(groups) * share.trained_bytes * self.reduce_ratio * reductions)
            yield Transfer("all-reduce between groups", nbytes, self.procs, False)
