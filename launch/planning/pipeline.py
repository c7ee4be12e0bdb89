"""What a pipeline holds and sends: each process a part of the layers, with several micro-batches under way at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import product

from launch.planning.gpus import NODE
from launch.planning.memory import Accountant, Way
from launch.planning.memory_parts import MemoryParts, ParameterShare, Sent, shared
from launch.planning.planned_model import EMBEDS, HEADS, PlannedModel
from launch.planning.schedules import order
from launch.planning.trace import Trace
from trainer.config.pipeline_schedules import SCHEDULES, micro_batches
from trainer.strategies.stages import ModelCosts, balance, stage_of


class Pipeline(Accountant):
    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs == 1 or not subject.whole.cuttable:
            return
        splits = subject.splits(min(NODE, procs))[:1]
        for stages, split in product((2, 4, 8), [(), *splits]):
            if len(subject.whole.blocks) >= stages:
                yield ("strategy=pipeline", f"strategy.stages={stages}", *split)

    @property
    def measured(self) -> ModelCosts:
        return self.subject.measured

    @cached_property
    def parts(self) -> list[range]:
        return balance(self.measured, self.layout.stages * self.strategy.stages_per_rank)

    def stages_on(self, position: int) -> list[int]:
        stages = self.layout.stages
        return [part for part in range(len(self.parts)) if stage_of(self.strategy, stages, part) == position]

    def micro_batches(self) -> tuple[int, int]:
        count = micro_batches(self.strategy, self.layout.stages, self.rows)
        return count, max(1, -(-self.rows // count))

    def share_of(self, position: int) -> ParameterShare:
        """What the process at that place holds."""
        mine, last = self.stages_on(position), len(self.parts) - 1
        blocks = {block for part in mine for block in self.parts[part]}
        ends = ({EMBEDS} if 0 in mine else set()) | ({HEADS} if last in mine else set())
        return ParameterShare([p for p in self.built.parameters if p.block in blocks or p.ends & ends], self.shards())

    def part_trace(self, part: int) -> Trace:
        """Returns the trace of one of the pipeline's micro-batches on a stage."""
        _, size = self.micro_batches()
        first, last = part == 0, part == len(self.parts) - 1
        return self.built.part(size, self.checkpointing, len(self.parts[part]), first, last)

    def shards(self) -> int:
        """Processes that a copy of each part's parameters is sharded over."""
        return self.copies if self.strategy.data_parallel == "fsdp" else 1

    def flops(self, position: int = 0) -> int:
        count, _ = self.micro_batches()
        return sum(self.part_trace(part).flops for part in self.stages_on(position)) * count * self.passes

    def within(self, position: int) -> int:
        count, _ = self.micro_batches()
        return sum(self.part_trace(part).sent for part in self.stages_on(position)) * count * self.passes

    def waiting(self) -> float:
        parts = self.strategy.stages_per_rank if not SCHEDULES[self.strategy.schedule].splits_backward else 2
        return 1 + (self.layout.stages - 1) / (parts * self.micro_batches()[0])

    def sent(self, position: int) -> Iterator[Sent]:
        share, last, copies = self.share_of(position), len(self.parts) - 1, self.copies
        spread = copies * self.layout.tensor  # from the first to the last of a copy's peers
        count, size = self.micro_batches()
        ends = sum((part != 0) + (part != last) for part in self.stages_on(position))
        hidden = self.built.hidden_bytes * size // (self.layout.tensor if self.strategy.sequence_parallel else 1)
        if ends:
            yield Sent("activations to neighbors", hidden * count * ends * self.passes, self.procs, False)
        if copies > 1 and share.shards > 1:
            gathered = round(shared(copies) * share.padded * self.passes)
            yield Sent("gathering of parameters", gathered, spread, True)
            scattered = round(shared(copies) * share.padded * self.reduced * self.passes)
            yield Sent("scattering of gradients", scattered, spread, True)
        elif copies > 1:
            summed = round(2 * shared(copies) * share.trained * self.reduced)
            yield Sent("all-reduce of gradients", summed, spread, True)

    def details(self) -> Iterator[tuple[str, str]]:
        stages, (count, rows), measured = self.layout.stages, self.micro_batches(), self.measured
        if stages == 1:
            return
        what = f"{self.strategy.schedule}: {stages} processes, {self.strategy.stages_per_rank} part(s) on each"
        yield "pipeline", f"{what}; {count} micro-batches of {rows}"
        for position in range(stages):
            costs, names = [], []
            for part in self.stages_on(position):
                blocks = self.parts[part]
                ends = [(0, "embedding", measured.embedding), (len(self.parts) - 1, "head", measured.head)]
                names += [f"blocks {blocks[0]} to {blocks[-1]}", *(name for at, name, _ in ends if at == part)]
                costs += [*(measured.blocks[block] for block in blocks), *(cost for at, _, cost in ends if at == part)]
            yield (
                f"  {position}",
                f"{', '.join(names)}: {sum(cost.parameters for cost in costs):,} parameters, of a sequence "
                f"{sum(cost.flops for cost in costs) / 1e9:.3g} GFLOP forward, "
                f"{sum(cost.activations for cost in costs) / 1e6:.3g} MB of activations",
            )

    def moments(self, position: int) -> Iterator[MemoryParts]:
        """Micro-batches that are under way at once, in the schedule's order; what is received has a buffer for each."""
        share, (count, size), last = self.share_of(position), self.micro_batches(), len(self.parts) - 1
        mine = self.stages_on(position)
        traces = {part: self.part_trace(part) for part in mine}
        hidden = self.built.hidden_bytes * size
        if self.strategy.sequence_parallel:
            hidden //= self.layout.tensor
        received = sum((part != 0) + (part != last) for part in mine) * hidden * count
        sharded = share.shards > 1
        gathered = share.padded if sharded else 0  # parameters stay gathered
        held = share.parameter_bytes, share.trained if self.passes > 1 and not sharded else 0, share.state
        gradients = share.trained if not sharded else 0
        waiting: dict[tuple[int, int], int] = {}
        done: set[int] = set()
        for work in order(self.strategy, self.layout.stages, position, count):
            under_way = sum(waiting.values())
            trace = traces[work.part]
            if work.kind == "F":
                top = max(segment.peak for segment in trace.of(backward=False))
                waiting[work.part, work.number] = trace.retained
                yield MemoryParts(
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
                yield MemoryParts(
                    held[0], so_far + parts[0], held[2], under_way - retained + parts[1], received + gathered
                )
            if work.kind == "I":  # gradients of what the layers gave are kept for those of the weights
                waiting[work.part, work.number] = trace.retained + trace.weighted
            if work.kind in ("B", "W"):
                waiting.pop((work.part, work.number), None)
                done.add(work.part)
        end = share.padded if sharded else gradients
        yield MemoryParts(held[0], end, held[2], 0, received + gathered + (share.padded if sharded else 0))
        step = self.updated(share)
        yield step._replace(buffers=step.buffers + received + gathered)


def gradients_so_far(accumulated: int, done: Iterable[int], traces: dict[int, Trace], sharded: bool) -> int:
    """Returns the gradient bytes of stages that had a backward pass: unsharded until the last one is over."""
    return accumulated or sum(segment.gradients for part in done for segment in traces[part].segments)


def first_or_later(trace: Trace, later: bool) -> Iterator[tuple[int, int]]:
    """(gradients, activations) of each moment of a backward pass. A later one's gradients are added to those there."""
    before = 0
    for segment in trace.of(backward=True):
        yield before, segment.peak if later else segment.peak_with_gradients
        before += 0 if later else segment.gradients
