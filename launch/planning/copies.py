"""What DDP holds: a replica of the model on each process, and buckets of gradients."""

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
        """Yields the moments of a step. Gradients are views of permanent buckets, or are copied to them."""
        trace, share = self.trace(), ParameterShare(self.model.parameters)
        buckets = 0 if self.strategy.bucket_view else share.trained_bytes
        precision = self.config.precision
        if precision.reduce != precision.param:  # a bucket in fp32, and in the data type of the reduction
            buckets += min(self.strategy.bucket_mb * MIB, share.trained_bytes) * 3 // 2
        for segment in trace.segments:
            yield MemoryParts(share.parameter_bytes, share.trained_bytes, share.state_bytes, segment.peak, buckets)
        yield self.update_moment(share)._replace(buffers=buckets + self.update_moment(share).buffers)
