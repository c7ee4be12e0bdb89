"""Which sequences of a step, or of an evaluation, each replica computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Deal:
    """Deals rows to replicas one by one; or, with a size of `leaves`, in leaves of so many rows that are the same
    whichever replica computes them, some of them smaller where the rows do not divide.

    Leaf i of L has the rows i, i + L, i + 2L, ...: where `data.lanes` is a multiple of L, a replica reads only its own
    lanes.
    """

    leaves: int | None = None
    in_turn: bool = False
    """Whether leaves go to the replicas in turn, so that all of them compute neighbors at the same time; else each
    replica has a range of them."""

    def rows(self, size: int, replica: int, replicas: int) -> np.ndarray:
        """Returns the numbers of a replica's rows of a step of `size`, int64, in the order of computing them."""
        if self.leaves is None:
            return np.arange(replica, size, replicas)
        numbers = self.leaves_of(self.count(size), replica, replicas)
        return np.concatenate([np.empty(0, np.int64), *(self.leaf_rows(size, leaf) for leaf in numbers)])

    def batches(self, size: int, micro_batch: int, replica: int, replicas: int) -> Sequence[Sequence[int]]:
        """Returns the rows of each batch of a replica where `size` rows are evaluated: for all replicas the same number
        of batches, of at most `micro_batch` rows, the last ones maybe of none."""
        if self.leaves is None:
            together = micro_batch * replicas
            return [range(first + replica, min(first + together, size), replicas) for first in range(0, size, together)]
        shares = [self.leaf_rows(size, leaf).tolist() for leaf in self.leaves_of(self.count(size), replica, replicas)]
        return shares + [[]] * (-(-self.count(size) // replicas) - len(shares))

    def leaves_of(self, count: int, replica: int, replicas: int) -> list[int]:
        """Returns the numbers of a replica's leaves, of `count`, in the order in which it computes them."""
        each = -(-count // replicas)
        numbers = range(replica, count, replicas) if self.in_turn else range(replica * each, (replica + 1) * each)
        return [leaf for leaf in numbers if leaf < count]

    def leaf_rows(self, size: int, leaf: int) -> np.ndarray:
        """Returns the numbers of the rows of a leaf, in order."""
        return np.arange(leaf, size, self.count(size))

    def count(self, size: int) -> int:
        """Returns the number of leaves of a step of `size` rows."""
        assert self.leaves is not None
        return -(-size // self.leaves)


ROW_BY_ROW = Deal()
