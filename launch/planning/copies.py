"""What DDP holds: a copy of the model on each process, and buckets of gradients."""

from __future__ import annotations

from collections.abc import Iterator

from launch.planning.memory import Accountant, Way
from launch.planning.parts import MIB, Parts, Share
from launch.planning.subject import Subject


class Copies(Accountant):
    @classmethod
    def ways(cls, subject: Subject, procs: int) -> Iterator[Way]:
        if procs > 1:
            yield ("strategy=ddp",)

    def moments(self, place: int) -> Iterator[Parts]:
        """Gradients are views of buckets that are always there, or are copied to them."""
        trace, share = self.trace(), Share(self.built.parameters)
        buckets = 0 if self.strategy.bucket_view else share.trained
        precision = self.config.precision
        if precision.reduce != precision.param:  # a bucket in fp32, and as it is sent
            buckets += min(self.strategy.bucket_mb * MIB, share.trained) * 3 // 2
        for segment in trace.segments:
            yield Parts(share.held, share.trained, share.state, segment.peak, buckets)
        yield self.updated(share)._replace(buffers=buckets + self.updated(share).buffers)
