"""The number of sequences in each step: the global batch, and the ramp that may lead up to it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise


class Batches:
    """Knows the batch size of every step: `ramp[s] = b` means b sequences a step until step s; after the last of them,
    `global_batch`."""

    def __init__(self, global_batch: int, ramp: Mapping[int, int] | None = None):
        ramp_ends = sorted((ramp or {}).items())
        bounds = [0, *(step for step, _ in ramp_ends)]
        self._stretches: list[tuple[int, int, int]] = []  # first step, sequences before it, batch size
        sequences = 0
        for (begin, end), (_, size) in zip(pairwise(bounds), ramp_ends, strict=True):
            self._stretches.append((begin, sequences, size))
            sequences += (end - begin) * size
        self._stretches.append((bounds[-1], sequences, global_batch))

    def size(self, done: int) -> int:
        """Returns the number of sequences in the step that follows `done` finished steps."""
        return self._stretch(done)[2]

    def position(self, done: int) -> int:
        """Returns the number of sequences in the first `done` steps together: where in the run the next step begins."""
        begin, before, size = self._stretch(done)
        return before + (done - begin) * size

    def _stretch(self, done: int) -> tuple[int, int, int]:
        return next(stretch for stretch in reversed(self._stretches) if stretch[0] <= done)
