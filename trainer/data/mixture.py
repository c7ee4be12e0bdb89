"""The mixture: which source each sequence of a run comes from. Shares are exact at every position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from trainer.data.order import Numbers

LONGEST_CYCLE = 1 << 14


@dataclass(frozen=True)
class _Segment:
    """Deals positions from `start` on in cycles: slot s gets from `source[s]` its number `rank[s]` of the cycle."""

    start: int
    source: Numbers
    rank: Numbers
    counts: Numbers
    bases: Numbers  # sequences of each source before `start`

    def counts_before(self, position: int) -> Numbers:
        """Returns how many sequences of each source come before `position`, int64 [sources]."""
        cycles, slots = divmod(position - self.start, len(self.source))
        return self.bases + cycles * self.counts + np.bincount(self.source[:slots], minlength=len(self.counts))


class Mixture:
    """Deals the positions of a run to sources: after any k of them source i has been dealt k * its share, within one.

    `schedule`: (first position, weights of the sources, in their order) of every stretch of the run, from 0 on.
    A weight may be 0; shares are weights over their sum, exact up to a cycle of `LONGEST_CYCLE`. Raises ValueError for
    weights that are negative or all 0.
    """

    def __init__(self, schedule: Sequence[tuple[int, Sequence[float]]]):
        starts = [start for start, _ in schedule]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"the stretches of a mixture begin at 0 and rise, not {starts}")
        self._starts = starts
        self._segments: list[_Segment] = []
        for start, weights in schedule:
            counts = cycle(weights)
            source = deal(counts)
            rank = np.empty(len(source), np.int64)
            for i in range(len(counts)):
                rank[source == i] = np.arange(counts[i])
            bases = self._segments[-1].counts_before(start) if self._segments else np.zeros(len(counts), np.int64)
            self._segments.append(_Segment(start, source, rank, np.array(counts, np.int64), bases))

    def at(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Returns (source, number of the sequence in that source) at each of `positions`, int64 [k] each."""
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        segment_numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(segment_numbers):
            segment, in_segment = self._segments[number], segment_numbers == number
            cycles, slots = np.divmod(positions[in_segment] - segment.start, len(segment.source))
            sources[in_segment] = source = segment.source[slots]
            numbers[in_segment] = segment.bases[source] + cycles * segment.counts[source] + segment.rank[slots]
        return sources, numbers

    def counts_before(self, position: int) -> list[int]:
        """Returns how many sequences of each source come before `position`."""
        return self._segments[bisect_right(self._starts, position) - 1].counts_before(position).tolist()


def cycle(weights: Sequence[float]) -> list[int]:
    """Returns integers in the ratio of `weights`: exactly, or by largest remainders where that makes too long a
    cycle."""
    shares = [Fraction(str(weight)) for weight in weights]
    if not shares or min(shares) < 0 or not any(shares):
        raise ValueError(f"weights are >= 0 and not all 0, not {list(weights)}")
    scale = lcm(*(share.denominator for share in shares))
    counts = [int(share * scale) for share in shares]
    counts = [count // gcd(*counts) for count in counts]
    if (total := sum(counts)) <= LONGEST_CYCLE:
        return counts
    wholes = [count * LONGEST_CYCLE // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-(counts[i] * LONGEST_CYCLE % total), i))
    for i in by_remainder[: LONGEST_CYCLE - sum(wholes)]:
        wholes[i] += 1
    return wholes


def deal(counts: Sequence[int]) -> Numbers:
    """Deals a row in which source i occurs `counts[i]` times, as evenly as possible: every prefix of it has each
    source's share within less than one (Tijdeman, "The chairman assignment problem", 1980).

    Returns int64 [sum of counts].
    """
    total, counts_so_far = sum(counts), [0] * len(counts)
    slack = max(1, 2 * len(counts) - 2)
    row = np.empty(total, np.int64)
    for slot in range(total):
        # Of the sources that are far enough behind to be served: the one whose deadline comes first.
        due = [i for i, c in enumerate(counts) if slack * (c * (slot + 1) - counts_so_far[i] * total) >= total and c]
        chosen = (
            min(due, key=lambda i: (Fraction(slack * (counts_so_far[i] + 1) - 1, counts[i]), i))
            if len(due) > 1
            else due[0]
        )
        row[slot] = chosen
        counts_so_far[chosen] += 1
    return row
