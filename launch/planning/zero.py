"""What DeepSpeed's ZeRO holds (Rajbhandari et al. 2020; as version 0.19 does it), stages 0 to 3, of fp32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from launch.planning.memory import Accountant, Way
from launch.planning.memory_parts import MIB, MemoryParts, ParameterShare, Transfer, ring_fraction
from launch.planning.planned_model import PlannedModel
from launch.planning.trace import OUTSIDE

PERSISTENT = 100_000  # elements: smaller parameters stay gathered in stage 3 (stage3_param_persistence_threshold)
SUB_GROUP = 10**9  # elements that stage 3 steps on at once (sub_group_size)


class Zero(Accountant):
    counts_single_process = True

    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs > 1 and find_spec("deepspeed"):
            yield from [("strategy=zero", f"strategy.stage={stage}") for stage in (1, 2, 3)]

    def moments(self, position: int) -> Iterator[MemoryParts]:
        if self.strategy.stage == 0:
            yield from self._unsharded_moments()
        elif self.strategy.stage == 3:
            yield from self._all_sharded_moments()
        else:
            yield from self._optimizer_sharded_moments()

    def transfers(self, position: int) -> Iterator[Transfer]:
        share, n, stage = ParameterShare(self.model.parameters), self.replicas, self.strategy.stage
        nbytes = share.trained_bytes * self.reduce_ratio * (self.passes if stage >= 2 else 1)
        if stage == 3:
            gathered = round(2 * ring_fraction(n) * share.parameter_bytes * self.passes)
            yield Transfer("gathering of parameters", gathered, n, False)
            yield Transfer("scattering of gradients", round(ring_fraction(n) * nbytes), n, False)
        else:
            yield Transfer("all-reduce of gradients", round(2 * ring_fraction(n) * nbytes), n, False)

    def _unsharded_moments(self) -> Iterator[MemoryParts]:
        """Yields the moments of stage 0: gradients are flattened into one buffer, summed and copied back."""
        share, computed = ParameterShare(self.model.parameters), 0
        for segment in self.trace().segments:
            accumulates = self.passes > 1
            gradients = share.trained_bytes if accumulates else computed
            activations = segment.peak if accumulates else segment.peak_with_gradients
            yield MemoryParts(share.parameter_bytes, gradients, share.state_bytes, activations)
            computed += segment.gradients
        yield MemoryParts(
            share.parameter_bytes,
            share.trained_bytes,
            share.state_bytes,
            0,
            share.trained_bytes if self.procs > 1 else 0,
        )
        yield self.update_moment(share)

    def _optimizer_sharded_moments(self) -> Iterator[MemoryParts]:
        """Yields the moments of stages 1 and 2: all weights, and a copy of the shard that the optimizer steps on."""
        share, procs = ParameterShare(self.model.parameters), self.procs
        part, state = share.trained_bytes // procs, share.state_bytes // procs
        bucket = self.strategy.bucket_mb * MIB
        weights, optimizer = share.parameter_bytes + part, state
        if self.strategy.offload_optimizer:
            weights, optimizer, part = share.parameter_bytes, 0, 0
        gradients = share.trained_bytes if self.strategy.stage == 1 else part
        computed = 0
        for segment in self.trace().segments:
            if not segment.backward:
                yield MemoryParts(weights, gradients if self.passes > 1 else 0, optimizer, segment.peak, 0)
                continue
            # Until a full bucket is reduced its gradients stay as computed, too; then stage 2 keeps its shard.
            held_gradients = min(gradients, computed) if self.passes == 1 else gradients
            unreduced = min(computed + segment.gradients, bucket) if self.strategy.stage == 2 else 0
            yield MemoryParts(weights, held_gradients, optimizer, segment.peak, bucket + unreduced)
            computed += segment.gradients
        yield MemoryParts(weights, gradients + (part if self.strategy.stage == 1 else 0), optimizer, 0, bucket)

    def _all_sharded_moments(self) -> Iterator[MemoryParts]:
        """Yields the moments of stage 3: the current and the next layer are gathered, small parameters always."""
        procs, parameters = self.procs, self.model.parameters
        small_parameters = [parameter for parameter in parameters if parameter.numel <= PERSISTENT]
        share = ParameterShare(parameters)
        part, state = share.trained_bytes // procs, share.state_bytes // procs
        large_parameters = [parameter for parameter in parameters if parameter not in small_parameters]
        layers = [
            sum(p.nbytes for p in large_parameters if p.block == number) for number in range(len(self.model.blocks))
        ]
        outside = [p.nbytes for p in large_parameters if p.block == OUTSIDE]
        largest = max([*layers, 0]) if layers else sum(outside)
        persistent = sum(parameter.nbytes for parameter in small_parameters)
        bucket = self.strategy.bucket_mb * MIB
        weights = 0 if self.strategy.offload_parameters else share.parameter_bytes // procs
        gradients = optimizer = 0
        if not self.strategy.offload_optimizer:
            weights, gradients, optimizer = weights + part, part, state
        unreduced = 0  # gradients as they were computed, until a full bucket of them is reduced
        for segment in self.trace(released=True, casts_kept=False).segments:
            gathered = min(2 * largest, sum(layers)) + (max([*outside, 0]) if segment.block == OUTSIDE else 0)
            buffers = bucket + persistent + gathered + unreduced
            yield MemoryParts(weights, gradients, optimizer, segment.peak_with_gradients, buffers)
            unreduced = min(unreduced + segment.gradients, bucket)
        yield MemoryParts(weights, gradients, optimizer, 0, bucket + persistent + min(gradients, 4 * SUB_GROUP))
