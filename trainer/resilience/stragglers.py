"""Slow ranks: every half minute all compare how long they waited for data and computed forward passes, in one line.

Only work that a rank does alone can show that it is slow: where ranks wait for each other, all are as slow as the
slowest. So forward passes count where they communicate nothing (single, ddp, zero 0 to 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from trainer.topology import Topology
from trainer.tracking.run_files import Appender

RANKS = "ranks.jsonl"
EVERY_S = 30.0
FACTOR, LEAST = 1.5, 0.02  # of the median, and of the time between two comparisons: a straggler exceeds both


class Stragglers:
    def __init__(self, topology: Topology, file: Appender | None):
        """`file` is where the main rank appends the lines."""
        self.topology, self.file = topology, file
        self._compared_at, self._local_seconds = 0.0, {"data_wait_s": 0.0, "forward_s": 0.0}

    def record(self, data_wait: float, forward: float) -> None:
        """Adds seconds of this rank."""
        self._local_seconds["data_wait_s"] += data_wait
        self._local_seconds["forward_s"] += forward

    def compare_ranks(self, step: int, elapsed: float) -> list[dict[str, Any]]:
        """Returns events of stragglers. All ranks call it with equal arguments; twice a minute it is a collective."""
        if self.topology.world_size == 1 or elapsed < self._compared_at + EVERY_S:
            return []
        span, self._compared_at = elapsed - self._compared_at, elapsed
        gathered = self.topology.gather({kind: round(value, 4) for kind, value in self._local_seconds.items()})
        self._local_seconds = dict.fromkeys(self._local_seconds, 0.0)
        row = {kind: [seconds[kind] for seconds in gathered] for kind in self._local_seconds}
        if self.file is not None:
            self.file.append([{"step": step, "seconds": round(span, 2), **row}])
        return [
            {"kind": "straggler", "rank": rank, "what": kind, "seconds": values[rank], "median": median(values)}
            for kind, values in row.items()
            for rank in find_slow(values, span)
        ]


def find_slow(values: Sequence[float], span: float) -> list[int]:
    """Returns the ranks whose seconds, within a time of `span` seconds, are far above the median."""
    median_value = median(values)
    return [
        rank
        for rank, value in enumerate(values)
        if value > FACTOR * median_value and value - median_value > LEAST * span
    ]
