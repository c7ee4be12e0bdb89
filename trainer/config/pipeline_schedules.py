"""The pipeline schedules and what they can do: one table for the config's check, the strategy and the docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Cut(Protocol):
    """The keys of a pipeline that decide about micro-batches."""

    @property
    def schedule(self) -> str: ...
    @property
    def micro_batches(self) -> int | None: ...
    @property
    def stages_per_rank(self) -> int: ...


@dataclass(frozen=True)
class Schedule:
    torch_name: str
    parts: int | None
    """Stages that each process holds; None: any number of two or more."""
    v_shaped: bool
    """Process r holds the stages r and 2P-1-r of 2P, so the first and the last are on one process; else r, r+P, ..."""
    least: Callable[[int, int], int]
    """Returns the least number of micro-batches for (processes, stages)."""
    rounds: bool
    """The number of micro-batches n must be a multiple of n // processes."""
    splits_backward: bool
    """Gradients of weights are computed apart from those of activations, which excludes torch.compile."""
    idle: str
    """The share of time that a process waits, with p processes, v stages on each, m micro-batches."""
    source: str


SCHEDULES = {
    "gpipe": Schedule(
        "GPipe", 1, False, lambda p, n: 1, False, False, "(p-1) / (m+p-1)", "Huang et al. 2019, section 2.3"
    ),
    "1f1b": Schedule(
        "1F1B", 1, False, lambda p, n: n, False, False, "(p-1) / (m+p-1)", "Narayanan et al. 2019, section 3.2"
    ),
    "interleaved_1f1b": Schedule(
        "Interleaved1F1B", None, False, lambda p, n: 1, True, False, "(p-1) / (vm+p-1)",
        "Narayanan et al. 2021, section 2.2",
    ),
    "interleaved_zero_bubble": Schedule(
        "InterleavedZeroBubble", None, False, lambda p, n: 1, True, True, "less: filled with weights' gradients",
        "Qi et al. 2023, section 2",
    ),
    "zbv": Schedule(
        "ZBVZeroBubble", 2, True, lambda p, n: 1, False, True, "about 0 where forward, input and weight take as long",
        "Qi et al. 2024, section 3",
    ),
    "dualpipev": Schedule(
        "DualPipeV", 2, True, lambda p, n: n, False, True, "about 0, with forward and backward overlapped",
        "DeepSeek-V3, section 3.2.1, cut in half",
    ),
}  # fmt: skip


def micro_batches(config: Cut, processes: int, sequences: int) -> int:
    """Returns the number of micro-batches that so many sequences are split into.

    With `strategy.micro_batches=null` it is the number n, up to four a stage, for which (n + processes - 1) steps of
    ceil(sequences / n) sequences each take the least time.
    """
    if config.micro_batches:
        return config.micro_batches
    allowed = allowed_micro_batches(config, processes, 4 * processes * config.stages_per_rank)
    return min(allowed, key=lambda n: ((n + processes - 1) * -(-max(1, sequences) // n), n))


def allowed_micro_batches(config: Cut, processes: int, at_most: int) -> list[int]:
    """Returns the numbers of micro-batches up to `at_most` that the schedule allows, in rising order; at least one."""
    schedule = SCHEDULES[config.schedule]
    least = schedule.least(processes, processes * config.stages_per_rank)
    allowed = range(least, max(least, at_most) + 1)
    return [n for n in allowed if not schedule.rounds or n % max(1, n // processes) == 0]
