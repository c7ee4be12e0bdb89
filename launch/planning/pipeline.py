"""What a pipeline holds and sends: each rank has some of the layers, and several micro-batches are in flight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import product

from launch.planning.gpus import NODE
from launch.planning.memory import Accountant, Way
from launch.planning.memory_parts import MemoryParts, ParameterShare, Transfer, ring_fraction
from launch.planning.planned_model import EMBEDS, HEADS, PlannedModel
from launch.planning.schedules import order
from launch.planning.trace import Trace
from trainer.config import Config
from trainer.config.pipeline_schedules import SCHEDULES, micro_batches
from trainer.strategies.stages import ModelCosts, balance, pp_rank_of_stage


class Pipeline(Accountant):
    def __init__(self, subject: PlannedModel, config: Config, procs: int):
        super().__init__(subject, config, procs)
        if self.leafwise:  # what the pipeline cuts are the leaves of a step
            self.leaf, leaves = self.rows, self.passes
            self.leaves_together = micro_batches(self.strategy, self.layout.stages, leaves)
            self.rows, self.passes = self.leaf * self.leaves_together, -(-leaves // self.leaves_together)

    @classmethod
    def ways(cls, subject: PlannedModel, procs: int) -> Iterator[Way]:
        if procs == 1 or not subject.whole.cuttable:
            return
        splits = subject.splits(min(NODE, procs))[:1]
        for stages, split in product((2, 4, 8), [(), *splits]):
            if len(subject.whole.blocks) >= stages:
                yield ("strategy=pipeline", f"strategy.stages={stages}", *split)

    @property
    def costs(self) -> ModelCosts:
        return self.subject.costs

    @cached_property
    def stage_blocks(self) -> list[range]:
        return balance(self.costs, self.layout.stages * self.strategy.stages_per_rank)

    def stages_on(self, position: int) -> list[int]:
        stages = self.layout.stages
        numbers = range(len(self.stage_blocks))
        return [stage for stage in numbers if pp_rank_of_stage(self.strategy, stages, stage) == position]

    def micro_batches(self) -> tuple[int, int]:
        if self.leafwise:
            return self.leaves_together, self.leaf
        count = micro_batches(self.strategy, self.layout.stages, self.rows)
        return count, max(1, -(-self.rows // count))

    def share_of(self, position: int) -> ParameterShare:
        """Returns the parameters of the process at this position."""
        stages, last = self.stages_on(position), len(self.stage_blocks) - 1
        blocks = {block for stage in stages for block in self.stage_blocks[stage]}
        ends = ({EMBEDS} if 0 in stages else set()) | ({HEADS} if last in stages else set())
        return ParameterShare([p for p in self.model.parameters if p.block in blocks or p.ends & ends], self.shards())

    def gradient_share(self, position: int) -> ParameterShare:
        return ParameterShare(self.share_of(position).parameters)  # whole until the end of the step

    def leaf_sums_bytes(self, position: int) -> int:
        """Returns, besides, the bytes of a tied embedding's gradients that wait for those of the other end."""
        nbytes = super().leaf_sums_bytes(position)
        if not self.leafwise or self.layout.stages == 1:
            return nbytes
        tied = [p for p in self.gradient_share(position).parameters if p.ends == {EMBEDS, HEADS}]
        return nbytes + self.leaves_together * ParameterShare(tied).trained_bytes

    def stage_trace(self, stage: int) -> Trace:
        """Returns the trace of one of the pipeline's micro-batches on a stage."""
        _, size = self.micro_batches()
        first, last = stage == 0, stage == len(self.stage_blocks) - 1
        return self.model.trace_blocks(size, self.checkpointing, len(self.stage_blocks[stage]), first, last)

    def shards(self) -> int:
        """Returns the number of processes that a stage's parameters are sharded over."""
        return self.replicas if self.strategy.data_parallel == "fsdp" else 1

    def flops(self, position: int = 0) -> int:
        count, _ = self.micro_batches()
        return sum(self.stage_trace(stage).flops for stage in self.stages_on(position)) * count * self.passes

    def bytes_within_layers(self, position: int) -> int:
        count, _ = self.micro_batches()
        return sum(self.stage_trace(stage).collective_bytes for stage in self.stages_on(position)) * count * self.passes

    def bubble_factor(self) -> float:
        chunks = self.strategy.stages_per_rank if not SCHEDULES[self.strategy.schedule].splits_backward else 2
        return 1 + (self.layout.stages - 1) / (chunks * self.micro_batches()[0])

    def transfers(self, position: int) -> Iterator[Transfer]:
        share, last, replicas = self.share_of(position), len(self.stage_blocks) - 1, self.replicas
        group_span = replicas * self.layout.tensor  # ranks from the first to the last replica's peer
        count, size = self.micro_batches()
        ends = sum((stage != 0) + (stage != last) for stage in self.stages_on(position))
        hidden = self.model.hidden_bytes * size // (self.layout.tensor if self.strategy.sequence_parallel else 1)
        if ends:
            yield Transfer("activations to neighbors", hidden * count * ends * self.passes, self.procs, False)
        if replicas > 1 and share.shards > 1:
            gathered_bytes = round(ring_fraction(replicas) * share.padded_bytes * self.passes)
            yield Transfer("gathering of parameters", gathered_bytes, group_span, True)
            reductions = 1 if self.leafwise else self.passes
            scattered_bytes = round(ring_fraction(replicas) * share.padded_bytes * self.reduce_ratio * reductions)
            yield Transfer("scattering of gradients", scattered_bytes, group_span, True)
        elif replicas > 1:
            nbytes = round(2 * ring_fraction(replicas) * share.trained_bytes * self.reduce_ratio)
            yield Transfer("all-reduce of gradients", nbytes, group_span, True)

    def details(self) -> Iterator[tuple[str, str]]:
        stages, (count, rows), costs = self.layout.stages, self.micro_batches(), self.costs
        if stages == 1:
            return
        summary = f"{self.strategy.schedule}: {stages} processes, {self.strategy.stages_per_rank} part(s) on each"
        yield "pipeline", f"{summary}; {count} micro-batches of {rows}"
        for position in range(stages):
            stage_costs, names = [], []
            for stage in self.stages_on(position):
                blocks = self.stage_blocks[stage]
                ends = [(0, "embedding", costs.embedding), (len(self.stage_blocks) - 1, "head", costs.head)]
                ends = [end for end in ends if end[0] == stage]
                names += [f"blocks {blocks[0]} to {blocks[-1]}", *(name for _, name, _ in ends)]
                stage_costs += [*(costs.blocks[block] for block in blocks), *(cost for _, _, cost in ends)]
            yield (
                f"  {position}",
                f"{', '.join(names)}: {sum(cost.parameters for cost in stage_costs):,} parameters, of a sequence "
                f"{sum(cost.flops for cost in stage_costs) / 1e9:.3g} GFLOP forward, "
                f"{sum(cost.activations for cost in stage_costs) / 1e6:.3g} MB of activations",
            )

    def moments(self, position: int) -> Iterator[MemoryParts]:
        """Yields the moments of the schedule's order, with micro-batches in flight and a receive buffer for each."""
        share, (count, size), last = self.share_of(position), self.micro_batches(), len(self.stage_blocks) - 1
        stages = self.stages_on(position)
        traces = {stage: self.stage_trace(stage) for stage in stages}
        hidden = self.model.hidden_bytes * size
        if self.strategy.sequence_parallel:
            hidden //= self.layout.tensor
        received = sum((stage != 0) + (stage != last) for stage in stages) * hidden * count
        sharded = share.shards > 1
        gathered = share.padded_bytes if sharded else 0  # parameters stay gathered
        weights, state = share.parameter_bytes, share.state_bytes
        accumulated = share.trained_bytes if self.passes > 1 and not sharded else 0
        gradients = share.trained_bytes if not sharded else 0
        retained_bytes: dict[tuple[int, int], int] = {}
        stages_done: set[int] = set()
        for work in order(self.strategy, self.layout.stages, position, count):
            in_flight = sum(retained_bytes.values())
            trace = traces[work.stage]
            if work.kind == "F":
                peak = max(segment.peak for segment in trace.segments_of(backward=False))
                retained_bytes[work.stage, work.number] = trace.retained
                yield MemoryParts(
                    weights,
                    gradients_so_far(accumulated, stages_done, traces, sharded),
                    state,
                    in_flight + peak,
                    received + gathered,
                )
                continue
            retained = retained_bytes[work.stage, work.number] if work.kind != "W" else trace.retained
            current = gradients_so_far(accumulated, stages_done, traces, sharded)
            for pass_gradients, activations in first_or_later(trace, work.stage in stages_done or self.passes > 1):
                yield MemoryParts(
                    weights, current + pass_gradients, state, in_flight - retained + activations, received + gathered
                )
            if work.kind == "I":  # gradients of what the layers gave are kept for those of the weights
                retained_bytes[work.stage, work.number] = trace.retained + trace.weight_output_bytes
            if work.kind in ("B", "W"):
                retained_bytes.pop((work.stage, work.number), None)
                stages_done.add(work.stage)
        end = share.padded_bytes if sharded else gradients
        yield MemoryParts(weights, end, state, 0, received + gathered + (share.padded_bytes if sharded else 0))
        update = self.update_moment(share)
        yield update._replace(buffers=update.buffers + received + gathered)


def gradients_so_far(accumulated: int, stages_done: Iterable[int], traces: dict[int, Trace], sharded: bool) -> int:
    """Returns the gradient bytes of stages that had a backward pass: unsharded until the last one is over."""
    return accumulated or sum(segment.gradients for stage in stages_done for segment in traces[stage].segments)


def first_or_later(trace: Trace, later: bool) -> Iterator[tuple[int, int]]:
    """Yields (gradients, activations) of the moments of a backward pass. A later pass adds to existing gradients."""
    gradients = 0
    for segment in trace.segments_of(backward=True):
        yield gradients, segment.peak if later else segment.peak_with_gradients
        gradients += 0 if later else segment.gradients
