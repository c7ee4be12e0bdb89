"""What DeepSpeed's ZeRO holds (Rajbhandari et al. 2020; as version 0.19 does it), stages 0 to 3, of fp32 weights."""

from __future__ import annotations

from collections.abc import Iterator

from launch.planning.accountant import Accountant
from launch.planning.parts import MIB, Parts, Share
from launch.planning.trace import OUTSIDE
from trainer.config.strategy import Zero

PERSISTENT = 100_000  # elements: smaller parameters stay gathered in stage 3 (stage3_param_persistence_threshold)
SUB_GROUP = 10**9  # elements that stage 3 steps on at once (sub_group_size)


def moments(of: Accountant, strategy: Zero) -> Iterator[Parts]:
    if strategy.stage == 0:
        yield from _unsharded(of)
    elif strategy.stage == 3:
        yield from _all_sharded(of, strategy)
    else:
        yield from _optimizer_sharded(of, strategy)


def _unsharded(of: Accountant) -> Iterator[Parts]:
    """Gradients are flattened into one buffer, summed, and copied back."""
    share, before = Share(of.built.parameters), 0
    for segment in of.trace().segments:
        later = of.passes > 1
        gradients = share.trained if later else before
        activations = segment.peak if later else segment.peak_with_gradients
        yield Parts(share.held, gradients, share.state, activations)
        before += segment.gradients
    yield Parts(share.held, share.trained, share.state, 0, share.trained if of.procs > 1 else 0)
    yield of.updated(share)


def _optimizer_sharded(of: Accountant, strategy: Zero) -> Iterator[Parts]:
    """Stages 1 and 2: all weights, and once more this process's part of them, on which the optimizer steps."""
    share, procs = Share(of.built.parameters), of.procs
    part, state = share.trained // procs, share.state // procs
    bucket = strategy.bucket_mb * MIB
    weights, optimizer = share.held + part, state
    if strategy.offload_optimizer:
        weights, optimizer, part = share.held, 0, 0
    gradients = share.trained if strategy.stage == 1 else part
    before = 0
    for segment in of.trace().segments:
        if not segment.backward:
            yield Parts(weights, gradients if of.passes > 1 else 0, optimizer, segment.peak, 0)
            continue
        # Until a full bucket is reduced gradients are there as they were computed, too; then stage 2 keeps its part.
        held = min(gradients, before) if of.passes == 1 else gradients
        waiting = min(before + segment.gradients, bucket) if strategy.stage == 2 else 0
        yield Parts(weights, held, optimizer, segment.peak, bucket + waiting)
        before += segment.gradients
    yield Parts(weights, gradients + (part if strategy.stage == 1 else 0), optimizer, 0, bucket)


def _all_sharded(of: Accountant, strategy: Zero) -> Iterator[Parts]:
    """Stage 3. Gathered are the layer at work and the next one, and small parameters always."""
    procs, parameters = of.procs, of.built.parameters
    small = [parameter for parameter in parameters if parameter.numel <= PERSISTENT]
    share = Share(parameters)
    part, state = share.trained // procs, share.state // procs
    layers = [sum(p.nbytes for p in parameters if p.block == b and p not in small) for b in range(len(of.built.blocks))]
    outside = [p.nbytes for p in parameters if p.block == OUTSIDE and p not in small]
    largest = max([*layers, 0]) if layers else sum(outside)
    always = sum(parameter.nbytes for parameter in small)
    bucket = strategy.bucket_mb * MIB
    weights = (0 if strategy.offload_parameters else share.held // procs) + (0 if strategy.offload_optimizer else part)
    gradients, optimizer = (0, 0) if strategy.offload_optimizer else (part, state)
    waiting = 0  # gradients as they were computed, until a full bucket of them is reduced
    for segment in of.trace(released=True, casts_kept=False).segments:
        gathered = min(2 * largest, sum(layers)) + (max([*outside, 0]) if segment.block == OUTSIDE else 0)
        yield Parts(weights, gradients, optimizer, segment.peak_with_gradients, bucket + always + gathered + waiting)
        waiting = min(waiting + segment.gradients, bucket)
    yield Parts(weights, gradients, optimizer, 0, bucket + always + min(gradients, 4 * SUB_GROUP))
