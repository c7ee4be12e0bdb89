"""What a process holds at the fullest moment of a step, part by part: from a trace of the model, and from what each
strategy keeps and gathers around it.

How strategies do that is as torch 2.13 (DDP's buckets, FSDP2's gathered layers and buffers) and DeepSpeed 0.19 do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from launch.planning import zero
from launch.planning.parts import MIB, Parts, Share
from launch.planning.schedules import order
from launch.planning.subject import EMBEDS, HEADS, Built, Subject
from launch.planning.trace import OUTSIDE, Trace
from trainer.config import Config, schema
from trainer.config.pipelines import micro_batches
from trainer.precision import DTYPES
from trainer.strategies.stages import Measured, balance, hosts


class Accountant:
    """Memory of a config on a number of processes; each works on `rows` sequences at a time, `passes` times a step."""

    def __init__(self, subject: Subject, config: Config, procs: int):
        self.subject, self.config, self.procs = subject, config, procs
        self.strategy: Any = config.strategy
        self.layout = config.layout(procs)
        self.copies = procs // self.layout.processes
        share = max(1, config.train.global_batch // self.copies)
        self.rows = min(config.train.micro_batch or share, share)
        self.passes = -(-share // self.rows)
        self.checkpointing = config.train.activation_checkpointing

    @cached_property
    def built(self) -> Built:
        return self.subject.split(self.strategy, self.layout.tensor)

    @cached_property
    def traced(self) -> Built:
        """What computes: with weights in the compute data type, where they are gathered in it."""
        if getattr(self.strategy, "gather", "param") == "param" or self.procs == 1:
            return self.built
        return self.subject.split(self.strategy, self.layout.tensor, DTYPES[self.compute])

    def peak(self, place: int = 0) -> Parts:
        """The fullest moment of the process at this place of a pipeline (of any process, where there is none)."""
        return max(self._moments(place), key=lambda parts: parts.total)

    def peaks(self) -> list[Parts]:
        """Of every place."""
        return [self.peak(place) for place in range(self.layout.stages)]

    def _moments(self, place: int) -> Iterator[Parts]:
        strategy = self.strategy
        if isinstance(strategy, schema.Pipeline) and self.procs > 1:
            yield from self._pipeline(strategy, place)
            return
        if isinstance(strategy, schema.Zero):
            yield from zero.moments(self, strategy)
            return
        if isinstance(strategy, (schema.FSDP, schema.HSDP)) and self.procs > 1:
            yield from self._sharded(strategy)
            return
        trace, share = self.trace(), Share(self.built.parameters)
        if isinstance(strategy, schema.DDP) and self.procs > 1:
            yield from self._copied(strategy, trace, share)
            return
        yield from alone(trace, share, self.passes)
        yield self.updated(share)

    def trace(self, released: bool = False, casts_kept: bool = True) -> Trace:
        return self.traced.whole(self.rows, self.checkpointing, released, casts_kept)

    def flops(self, place: int = 0) -> int:
        """Operations of a process in a step, recomputation among them. Of layers that several share: its part."""
        if isinstance(self.strategy, schema.Pipeline) and self.procs > 1:
            count, _ = self.micro_batches()
            return sum(self.part_trace(part).flops for part in self.mine(place)) * count * self.passes
        return self.trace().flops * self.passes

    def updated(self, share: Share, offloaded: bool = False) -> Parts:
        """While the optimizer steps."""
        whole = sum(parameter.nbytes for parameter in self.subject.whole.parameters)
        besides = 0 if offloaded else round(self.subject.state[1] * share.held / max(1, whole))
        return Parts(share.held, share.trained, share.state, 0, besides)

    def _copied(self, strategy: schema.DDP, trace: Trace, share: Share) -> Iterator[Parts]:
        """DDP: gradients are views of buckets that are always there, or are copied to them."""
        buckets = 0 if strategy.bucket_view else share.trained
        precision = self.config.precision
        if precision.reduce != precision.param:  # a bucket in fp32, and as it is sent
            buckets += min(strategy.bucket_mb * MIB, share.trained) * 3 // 2
        for segment in trace.segments:
            yield Parts(share.held, share.trained, share.state, segment.peak, buckets)
        yield self.updated(share)._replace(buffers=buckets + self.updated(share).buffers)

    def shards(self) -> int:
        """Processes that a copy of each layer's parameters is sharded over."""
        if isinstance(self.strategy, schema.HSDP):
            return self.strategy.shard_size or min(8, self.procs)
        if isinstance(self.strategy, schema.Pipeline):
            return self.copies if self.strategy.data_parallel == "fsdp" else 1
        return self.copies

    def _sharded(self, strategy: schema.FSDP | schema.HSDP) -> Iterator[Parts]:
        """FSDP2. In the forward pass a layer is gathered, and what it was gathered into is let go of when the next one
        is; in the backward pass the one before is on its way already, and the gradients of the one behind are still
        being sent."""
        share, trace = Share(self.built.parameters, self.shards()), self.trace(casts_kept=False)
        gathered = (
            DTYPES[self.compute].itemsize / DTYPES[self.config.precision.param].itemsize
            if strategy.gather == "compute"
            else 1.0
        )
        reduced = DTYPES[self.config.precision.reduce].itemsize / DTYPES[self.config.precision.param].itemsize
        unit = [round(share.of_block(number).padded * gathered) for number in range(len(self.built.blocks))]
        sent = [round(share.of_block(number).padded * reduced) for number in range(len(self.built.blocks))]
        rest = round(share.of_block(OUTSIDE).padded * gathered)
        last, done = len(unit) - 1, 0
        held = share.held, 0 if self.passes == 1 else share.trained, share.state
        if strategy.cpu_offload:
            held = 0, 0, 0
        if strategy.reduce == "last" and self.passes > 1:  # whole, until the last micro-batch
            held = held[0], Share(self.built.parameters).trained, held[2]
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
                yield Parts(
                    held[0], held[1] + done, held[2], segment.peak_with_gradients, rest + rest_gradients + around
                )
                rest_gradients += segment.gradients
                continue
            before = unit[here - 1] if here else 0
            behind = sent[here + 1] if here < last else 0
            around = max(kept, unit[here] + before) + behind + tail
            yield Parts(held[0], held[1] + done, held[2], segment.peak_with_gradients, rest + rest_gradients + around)
            # Behind it: its gradients, and the buffer that they are sent from.
            around = max(kept, before) + sent[here] + segment.gradients + tail
            yield Parts(held[0], held[1] + done, held[2], segment.end, rest + rest_gradients + around)
            if self.passes == 1 and not strategy.cpu_offload:
                done += share.of_block(here).trained
        tail = unit[last] if unit else 0
        yield Parts(held[0], held[1] + done, held[2], 0, rest_gradients + round(rest_gradients * reduced) + tail)
        yield (
            Parts()
            if strategy.cpu_offload
            else self.updated(share)._replace(buffers=self.updated(share).buffers + tail)
        )

    @property
    def compute(self) -> str:
        return "bf16" if self.subject.precision.compute == "fp8" else self.subject.precision.compute

    # Pipelines

    @property
    def measured(self) -> Measured:
        return self.subject.measured

    @cached_property
    def parts(self) -> list[range]:
        return balance(self.measured, self.layout.stages * self.strategy.parts_a_process)

    def mine(self, place: int) -> list[int]:
        stages = self.layout.stages
        return [part for part in range(len(self.parts)) if hosts(self.strategy, stages, part) == place]

    def micro_batches(self) -> tuple[int, int]:
        """How many there are of each of the loop's, and sequences of each."""
        count = micro_batches(self.strategy, self.layout.stages, self.rows)
        return count, max(1, -(-self.rows // count))

    def share_of(self, place: int) -> Share:
        """What the process at that place holds."""
        mine, last = self.mine(place), len(self.parts) - 1
        blocks = {block for part in mine for block in self.parts[part]}
        ends = ({EMBEDS} if 0 in mine else set()) | ({HEADS} if last in mine else set())
        return Share([p for p in self.built.parameters if p.block in blocks or p.ends & ends], self.shards())

    def part_trace(self, part: int) -> Trace:
        """Of one of the pipeline's micro-batches in a part of the model."""
        _, size = self.micro_batches()
        first, last = part == 0, part == len(self.parts) - 1
        return self.built.part(size, self.checkpointing, len(self.parts[part]), first, last)

    def _pipeline(self, strategy: schema.Pipeline, place: int) -> Iterator[Parts]:
        """Micro-batches that are under way at once, in the schedule's order; what is received has a buffer for each."""
        share, (count, size), last = self.share_of(place), self.micro_batches(), len(self.parts) - 1
        mine = self.mine(place)
        traces = {part: self.part_trace(part) for part in mine}
        hidden = self.built.hidden_bytes * size
        if strategy.sequence_parallel:
            hidden //= self.layout.tensor
        received = sum((part != 0) + (part != last) for part in mine) * hidden * count
        sharded = share.shards > 1
        gathered = share.padded if sharded else 0  # parameters stay gathered
        held = share.held, share.trained if self.passes > 1 and not sharded else 0, share.state
        gradients = share.trained if not sharded else 0
        waiting: dict[tuple[int, int], int] = {}
        done: set[int] = set()
        for work in order(strategy, self.layout.stages, place, count):
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
            for parts in first_or_later(trace, work.part in done or self.passes > 1):
                yield Parts(held[0], so_far + parts[0], held[2], under_way - retained + parts[1], received + gathered)
            if work.kind == "I":  # gradients of what the layers gave are kept for those of the weights
                waiting[work.part, work.number] = trace.retained + trace.weighted
            if work.kind in ("B", "W"):
                waiting.pop((work.part, work.number), None)
                done.add(work.part)
        end = share.padded if sharded else gradients
        yield Parts(held[0], end, held[2], 0, received + gathered + (share.padded if sharded else 0))
        step = self.updated(share)
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
