"""How many sequences each optimizer step takes: the global batch, and the ramp that may lead up to it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise


class Batches:
    """`ramp[s] = b`: up to step s (from the entry before it on) a step takes b sequences; then `global_batch`."""

    def __init__(self, global_batch: int, ramp: Mapping[int, int] | None = None):
        until = sorted((ramp or {}).items())
        bounds = [0, *(step for step, _ in until)]
        self._stretches: list[tuple[int, int, int]] = []  # first of its finished steps, sequences before it, batch size
        taken = 0
        for (begin, end), (_, size) in zip(pairwise(bounds), until, strict=True):
            self._stretches.append((begin, taken, size))
            taken += (end - begin) * size
        self._stretches.append((bounds[-1], taken, global_batch))

    def size(self, done: int) -> int:
        """Sequences of the step behind `done` finished ones."""
        return self._stretch(done)[2]

    def taken(self, done: int) -> int:
        """Sequences of the first `done` steps together: where in the run the next one begins."""
        begin, before, size = self._stretch(done)
        return before + (done - begin) * size

    def _stretch(self, done: int) -> tuple[int, int, int]:
        return next(stretch for stretch in reversed(self._stretches) if stretch[0] <= done)
