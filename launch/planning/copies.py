"""What DDP holds: a copy of the model on each process, and buckets of gradients."""

from __future__ import annotations

from collections.abc import Iterator

from launch.planning.memory import Accountant, Way
from launch.planning.memory_parts import MIB, MemoryParts, ParameterShare
from launch.planning.planned_model import PlannedModel


class Copies(Accountant):
    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs > 1:
            yield ("strategy=ddp",)

    def moments(self, position: int) -> Iterator[MemoryParts]:
        """Gradients are views of buckets that are always there, or are copied to them."""
        trace, share = self.trace(), ParameterShare(self.built.parameters)
        buckets = 0 if self.strategy.bucket_view else share.trained
        precision = self.config.precision
        if precision.reduce != precision.param:  # a bucket in fp32, and as it is sent
            buckets += min(self.strategy.bucket_mb * MIB, share.trained) * 3 // 2
        for segment in trace.segments:
            yield MemoryParts(share.parameter_bytes, share.trained, share.state, segment.peak, buckets)
        yield self.updated(share)._replace(buffers=buckets + self.updated(share).buffers)
