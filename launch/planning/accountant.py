"""What each process of a run has to do: which parameters it holds, what it computes, in how many passes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from launch.planning.parts import Parts, Share
from launch.planning.subject import EMBEDS, HEADS, Built, Subject
from launch.planning.trace import Trace
from trainer.config import Config, schema
from trainer.config.pipelines import micro_batches
from trainer.precision import DTYPES
from trainer.strategies.build import runs_single
from trainer.strategies.stages import Measured, balance, hosts


class Accountant:
    """A config on a number of processes: who holds and computes what. Each works on `rows` sequences at a time,
    `passes` times a step."""

    def __init__(self, subject: Subject, config: Config, procs: int):
        self.subject, self.config, self.procs = subject, config, procs
        self.strategy: Any = config.strategy
        self.layout = config.layout(procs)
        self.copies = procs // self.layout.processes
        share = max(1, config.train.global_batch // self.copies)
        self.rows = min(config.train.micro_batch or share, share)
        self.passes = -(-share // self.rows)
        self.checkpointing = config.train.activation_checkpointing
        self.is_single = runs_single(config, procs)

    @cached_property
    def built(self) -> Built:
        return self.subject.split(self.strategy, self.layout.tensor)

    @cached_property
    def traced(self) -> Built:
        """What computes: with weights in the compute data type, where they are gathered in it."""
        if getattr(self.strategy, "gather", "param") == "param" or self.is_single:
            return self.built
        return self.subject.split(self.strategy, self.layout.tensor, DTYPES[self.compute])

    def trace(self, released: bool = False, casts_kept: bool = True) -> Trace:
        return self.traced.whole(self.rows, self.checkpointing, released, casts_kept)

    def flops(self, place: int = 0) -> int:
        """Operations of a process in a step, recomputation among them. Of layers that several share: its part."""
        if isinstance(self.strategy, schema.Pipeline) and not self.is_single:
            count, _ = self.micro_batches()
            return sum(self.part_trace(part).flops for part in self.mine(place)) * count * self.passes
        return self.trace().flops * self.passes

    def updated(self, share: Share, offloaded: bool = False) -> Parts:
        """While the optimizer steps."""
        whole = sum(parameter.nbytes for parameter in self.subject.whole.parameters)
        besides = 0 if offloaded else round(self.subject.state[1] * share.held / max(1, whole))
        return Parts(share.held, share.trained, share.state, 0, besides)

    def shards(self) -> int:
        """Processes that a copy of each layer's parameters is sharded over."""
        if isinstance(self.strategy, schema.HSDP):
            return self.strategy.shard_size or min(8, self.procs)
        if isinstance(self.strategy, schema.Pipeline):
            return self.copies if self.strategy.data_parallel == "fsdp" else 1
        return self.copies

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
