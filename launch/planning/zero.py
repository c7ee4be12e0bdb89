"""What DeepSpeed's ZeRO holds (Rajbhandari et al. 2020; as version 0.19 does it), stages 0 to 3, of fp32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from launch.planning.memory import Accountant, Way
from launch.planning.memory_parts import MIB, MemoryParts, ParameterShare, Sent, shared
from launch.planning.planned_model import PlannedModel
from launch.planning.trace import OUTSIDE

PERSISTENT = 100_000  # elements: smaller parameters stay gathered in stage 3 (stage3_param_persistence_threshold)
SUB_GROUP = 10**9  # elements that stage 3 steps on at once (sub_group_size)


class Zero(Accountant):
    alone = True

    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs > 1 and find_spec("deepspeed"):
            yield from [("strategy=zero", f"strategy.stage={stage}") for stage in (1, 2, 3)]

    def moments(self, position: int) -> Iterator[MemoryParts]:
        if self.strategy.stage == 0:
            yield from self._unsharded()
        elif self.strategy.stage == 3:
            yield from self._all_sharded()
        else:
            yield from self._optimizer_sharded()

    def sent(self, position: int) -> Iterator[Sent]:
        share, n, stage = ParameterShare(self.built.parameters), self.copies, self.strategy.stage
        reduced = share.trained * self.reduced * (self.passes if stage >= 2 else 1)
        if stage == 3:
            yield Sent("gathering of parameters", round(2 * shared(n) * share.parameter_bytes * self.passes), n, False)
            yield Sent("scattering of gradients", round(shared(n) * reduced), n, False)
        else:
            yield Sent("all-reduce of gradients", round(2 * shared(n) * reduced), n, False)

    def _unsharded(self) -> Iterator[MemoryParts]:
        """Gradients are flattened into one buffer, summed, and copied back."""
        share, before = ParameterShare(self.built.parameters), 0
        for segment in self.trace().segments:
            later = self.passes > 1
            gradients = share.trained if later else before
            activations = segment.peak if later else segment.peak_with_gradients
            yield MemoryParts(share.parameter_bytes, gradients, share.state, activations)
            before += segment.gradients
        yield MemoryParts(share.parameter_bytes, share.trained, share.state, 0, share.trained if self.procs > 1 else 0)
        yield self.updated(share)

    def _optimizer_sharded(self) -> Iterator[MemoryParts]:
        """Stages 1 and 2: all weights, and once more this process's part of them, on which the optimizer steps."""
        share, procs = ParameterShare(self.built.parameters), self.procs
        part, state = share.trained // procs, share.state // procs
        bucket = self.strategy.bucket_mb * MIB
        weights, optimizer = share.parameter_bytes + part, state
        if self.strategy.offload_optimizer:
            weights, optimizer, part = share.parameter_bytes, 0, 0
        gradients = share.trained if self.strategy.stage == 1 else part
        before = 0
        for segment in self.trace().segments:
            if not segment.backward:
                yield MemoryParts(weights, gradients if self.passes > 1 else 0, optimizer, segment.peak, 0)
                continue
            # Until a full bucket is reduced gradients are there as computed, too; then stage 2 keeps its part.
            held = min(gradients, before) if self.passes == 1 else gradients
            waiting = min(before + segment.gradients, bucket) if self.strategy.stage == 2 else 0
            yield MemoryParts(weights, held, optimizer, segment.peak, bucket + waiting)
            before += segment.gradients
        yield MemoryParts(weights, gradients + (part if self.strategy.stage == 1 else 0), optimizer, 0, bucket)

    def _all_sharded(self) -> Iterator[MemoryParts]:
        """Stage 3. Gathered are the layer at work and the next one, and small parameters always."""
        procs, parameters = self.procs, self.built.parameters
        small = [parameter for parameter in parameters if parameter.numel <= PERSISTENT]
        share = ParameterShare(parameters)
        part, state = share.trained // procs, share.state // procs
        large = [parameter for parameter in parameters if parameter not in small]
        layers = [sum(p.nbytes for p in large if p.block == number) for number in range(len(self.built.blocks))]
        outside = [p.nbytes for p in large if p.block == OUTSIDE]
        largest = max([*layers, 0]) if layers else sum(outside)
        always = sum(parameter.nbytes for parameter in small)
        bucket = self.strategy.bucket_mb * MIB
        weights = 0 if self.strategy.offload_parameters else share.parameter_bytes // procs
        gradients = optimizer = 0
        if not self.strategy.offload_optimizer:
            weights, gradients, optimizer = weights + part, part, state
        waiting = 0  # gradients as they were computed, until a full bucket of them is reduced
        for segment in self.trace(released=True, casts_kept=False).segments:
            gathered = min(2 * largest, sum(layers)) + (max([*outside, 0]) if segment.block == OUTSIDE else 0)
            buffers = bucket + always + gathered + waiting
            yield MemoryParts(weights, gradients, optimizer, segment.peak_with_gradients, buffers)
            waiting = min(waiting + segment.gradients, bucket)
        yield MemoryParts(weights, gradients, optimizer, 0, bucket + always + min(gradients, 4 * SUB_GROUP))
