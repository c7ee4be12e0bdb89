"""What a process holds at the fullest moment of a step, part by part: from a trace of the model, and from what each
strategy keeps and gathers around it.

How strategies do that is as torch 2.13 (DDP's buckets, FSDP2's gathered layers and buffers) and DeepSpeed 0.19 do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from launch.planning import zero
from launch.planning.accountant import Accountant
from launch.planning.parts import MIB, Parts, Share
from launch.planning.schedules import order
from launch.planning.trace import OUTSIDE, Trace
from trainer.config import schema
from trainer.precision import DTYPES


def peak(of: Accountant, place: int = 0) -> Parts:
    """The fullest moment of the process at this place of a pipeline (of any process, where there is none)."""
    moments = _single if of.is_single else MOMENTS[type(of.strategy)]
    return max(moments(of, of.strategy, place), key=lambda parts: parts.total)


def peaks(of: Accountant) -> list[Parts]:
    """Of every place."""
    return [peak(of, place) for place in range(of.layout.stages)]


def _single(of: Accountant, _strategy: Any, _place: int) -> Iterator[Parts]:
    share = Share(of.built.parameters)
    yield from alone(of.trace(), share, of.passes)
    yield of.updated(share)


def _copied(of: Accountant, strategy: schema.DDP, _place: int) -> Iterator[Parts]:
    """DDP: gradients are views of buckets that are always there, or are copied to them."""
    trace, share = of.trace(), Share(of.built.parameters)
    buckets = 0 if strategy.bucket_view else share.trained
    precision = of.config.precision
    if precision.reduce != precision.param:  # a bucket in fp32, and as it is sent
        buckets += min(strategy.bucket_mb * MIB, share.trained) * 3 // 2
    for segment in trace.segments:
        yield Parts(share.held, share.trained, share.state, segment.peak, buckets)
    yield of.updated(share)._replace(buffers=buckets + of.updated(share).buffers)


def _sharded(of: Accountant, strategy: schema.FSDP | schema.HSDP, _place: int) -> Iterator[Parts]:
    """FSDP2. In the forward pass a layer is gathered, and what it was gathered into is let go of when the next one
    is; in the backward pass the one before is on its way already, and the gradients of the one behind are still
    being sent."""
    share, trace = Share(of.built.parameters, of.shards()), of.trace(casts_kept=False)
    gathered = (
        DTYPES[of.compute].itemsize / DTYPES[of.config.precision.param].itemsize
        if strategy.gather == "compute"
        else 1.0
    )
    reduced = DTYPES[of.config.precision.reduce].itemsize / DTYPES[of.config.precision.param].itemsize
    unit = [round(share.of_block(number).padded * gathered) for number in range(len(of.built.blocks))]
    sent = [round(share.of_block(number).padded * reduced) for number in range(len(of.built.blocks))]
    rest = round(share.of_block(OUTSIDE).padded * gathered)
    last, done = len(unit) - 1, 0
    held = share.held, 0 if of.passes == 1 else share.trained, share.state
    if strategy.cpu_offload:
        held = 0, 0, 0
    if strategy.reduce == "last" and of.passes > 1:  # whole, until the last micro-batch
        held = held[0], Share(of.built.parameters).trained, held[2]
    kept = 0 if strategy.reshard_after_forward else sum(unit)
    rest_gradients = 0  # of what is outside of blocks: whole until the pass is over
    for segment in trace.segments:
        here = segment.block
        if not segment.backward:
            around = 2 * unit[here] if here != OUTSIDE else (unit[last] if segment is trace.segments[-1] else 0)
            yield Parts(*held[:3], segment.peak, rest + max(around, kept))
            continue
        tail = unit[last] if unit else 0  # what the last layer was gathered into, until the next forward pass
        if here == OUTSIDE:
            around = tail + (kept or (unit[last] if unit else 0))
            yield Parts(held[0], held[1] + done, held[2], segment.peak_with_gradients, rest + rest_gradients + around)
            rest_gradients += segment.gradients
            continue
        before = unit[here - 1] if here else 0
        behind = sent[here + 1] if here < last else 0
        around = max(kept, unit[here] + before) + behind + tail
        yield Parts(held[0], held[1] + done, held[2], segment.peak_with_gradients, rest + rest_gradients + around)
        # Behind it: its gradients, and the buffer that they are sent from.
        around = max(kept, before) + sent[here] + segment.gradients + tail
        yield Parts(held[0], held[1] + done, held[2], segment.end, rest + rest_gradients + around)
        if of.passes == 1 and not strategy.cpu_offload:
            done += share.of_block(here).trained
    tail = unit[last] if unit else 0
    yield Parts(held[0], held[1] + done, held[2], 0, rest_gradients + round(rest_gradients * reduced) + tail)
    yield (Parts() if strategy.cpu_offload else of.updated(share)._replace(buffers=of.updated(share).buffers + tail))


def _pipeline(of: Accountant, strategy: schema.Pipeline, place: int) -> Iterator[Parts]:
    """Micro-batches that are under way at once, in the schedule's order; what is received has a buffer for each."""
    share, (count, size), last = of.share_of(place), of.micro_batches(), len(of.parts) - 1
    mine = of.mine(place)
    traces = {part: of.part_trace(part) for part in mine}
    hidden = of.built.hidden_bytes * size
    if strategy.sequence_parallel:
        hidden //= of.layout.tensor
    received = sum((part != 0) + (part != last) for part in mine) * hidden * count
    sharded = share.shards > 1
    gathered = share.padded if sharded else 0  # parameters stay gathered
    held = share.held, share.trained if of.passes > 1 and not sharded else 0, share.state
    gradients = share.trained if not sharded else 0
    waiting: dict[tuple[int, int], int] = {}
    done: set[int] = set()
    for work in order(strategy, of.layout.stages, place, count):
        under_way = sum(waiting.values())
        trace = traces[work.part]
        if work.kind == "F":
            top = max(segment.peak for segment in trace.of(backward=False))
            waiting[work.part, work.number] = trace.retained
            yield Parts(
                held[0],
                gradients_so_far(held[1], done, traces, sharded),
                held[2],
                under_way + top,
                received + gathered,
            )
            continue
        retained = waiting[work.part, work.number] if work.kind != "W" else trace.retained
        so_far = gradients_so_far(held[1], done, traces, sharded)
        for parts in first_or_later(trace, work.part in done or of.passes > 1):
            yield Parts(held[0], so_far + parts[0], held[2], under_way - retained + parts[1], received + gathered)
        if work.kind == "I":  # gradients of what the layers gave are kept for those of the weights
            waiting[work.part, work.number] = trace.retained + trace.weighted
        if work.kind in ("B", "W"):
            waiting.pop((work.part, work.number), None)
            done.add(work.part)
    end = share.padded if sharded else gradients
    yield Parts(held[0], end, held[2], 0, received + gathered + (share.padded if sharded else 0))
    step = of.updated(share)
    yield step._replace(buffers=step.buffers + received + gathered)


def gradients_so_far(accumulated: int, done: Iterable[int], traces: dict[int, Trace], sharded: bool) -> int:
    """Of parts that had a backward pass: whole, also where parameters are sharded, until the last one is over."""
    return accumulated or sum(segment.gradients for part in done for segment in traces[part].segments)


def first_or_later(trace: Trace, later: bool) -> Iterator[tuple[int, int]]:
    """(gradients, activations) of each moment of a backward pass. A later one's gradients are added to those there."""
    before = 0
    for segment in trace.of(backward=True):
        yield before, segment.peak if later else segment.peak_with_gradients
        before += 0 if later else segment.gradients


def alone(trace: Trace, share: Share, passes: int) -> Iterator[Parts]:
    """A model on one process, without the update."""
    before = 0
    for segment in trace.segments:
        yield Parts(share.held, before, share.state, segment.peak_with_gradients, 0)
        before += segment.gradients
    for segment in trace.segments if passes > 1 else ():
        yield Parts(share.held, share.trained, share.state, segment.peak, 0)


MOMENTS: dict[type, Callable[[Accountant, Any, int], Iterator[Parts]]] = {
    schema.Single: _single,
    schema.DDP: _copied,
    schema.FSDP: _sharded,
    schema.HSDP: _sharded,
    schema.Zero: lambda of, strategy, _place: zero.moments(of, strategy),
    schema.Pipeline: _pipeline,
}
