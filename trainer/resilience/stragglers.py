"""Slow ranks: every half minute all tell how long they waited for data and computed forward passes, one line a look.

Only what a rank does without the others tells them apart: where it waits for them, all are as slow as the slowest. So
forward passes count where they exchange nothing (single, ddp, zero 0 to 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from trainer.topology import Topology
from trainer.tracking.run_files import Appender

RANKS = "ranks.jsonl"
EVERY_S = 30.0
FACTOR, LEAST = 1.5, 0.02  # of the median, and of the time between two looks, by which a rank is a straggler


class Stragglers:
    def __init__(self, topology: Topology, file: Appender | None):
        """`file`: where the main rank keeps the lines."""
        self.topology, self.file = topology, file
        self._looked, self._own = 0.0, {"data_wait_s": 0.0, "forward_s": 0.0}

    def record(self, data_wait: float, forward: float) -> None:
        """Adds seconds of this rank."""
        self._own["data_wait_s"] += data_wait
        self._own["forward_s"] += forward

    def look(self, step: int, elapsed: float) -> list[dict[str, Any]]:
        """All ranks call it with the same numbers; now and then one collective. Gives events of stragglers."""
        if self.topology.world_size == 1 or elapsed < self._looked + EVERY_S:
            return []
        span, self._looked = elapsed - self._looked, elapsed
        told = self.topology.gather({kind: round(value, 4) for kind, value in self._own.items()})
        self._own = dict.fromkeys(self._own, 0.0)
        row = {kind: [own[kind] for own in told] for kind in self._own}
        if self.file is not None:
            self.file.append([{"step": step, "seconds": round(span, 2), **row}])
        return [
            {"kind": "straggler", "rank": rank, "what": kind, "seconds": values[rank], "median": median(values)}
            for kind, values in row.items()
            for rank in find_slow(values, span)
        ]


def find_slow(values: Sequence[float], span: float) -> list[int]:
    """Ranks whose seconds stand out among all of them, in a time of `span` seconds."""
    usual = median(values)
    return [rank for rank, value in enumerate(values) if value > FACTOR * usual and value - usual > LEAST * span]
