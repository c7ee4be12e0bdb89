"""Which sequences of a step, or of an evaluation, each replica computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trainer.config import Config


@dataclass(frozen=True)
class Deal:
    """Deals rows to replicas one by one; or, with a size of `leaf`, in leaves: micro-batches of so many rows, the same
    ones whichever replica computes them. Some are smaller where the rows do not divide.

    Leaf i of L has the rows i, i + L, i + 2L, ...: where `data.lanes` is a multiple of L, a replica reads only its own
    lanes.
    """

    leaf: int | None = None
    neighbors: int = 1
    """Each group of so many neighboring replicas has a range of the leaves, which it computes in turn: they have
    neighboring leaves at the same time."""

    @classmethod
    def of(cls, config: Config, replicas: int, local_size: int) -> Deal:
        """Returns the deal of a run; `local_size`: processes of a node."""
        if config.train.deterministic == "run":
            return ROW_BY_ROW
        return cls(config.train.micro_batch, config.strategy.leafwise_neighbors(replicas, local_size))

    def rows(self, size: int, replica: int, replicas: int) -> np.ndarray:
        """Returns the numbers of a replica's rows of a step of `size`, int64, in the order of computing them."""
        if self.leaf is None:
            return np.arange(replica, size, replicas)
        numbers = self.leaves_of(self.count(size), replica, replicas)
        return np.concatenate([np.empty(0, np.int64), *(self.leaf_rows(size, leaf) for leaf in numbers)])

    def batches(self, size: int, micro_batch: int, replica: int, replicas: int) -> Sequence[Sequence[int]]:
        """Returns the rows of each batch of a replica where `size` rows are evaluated: for all replicas the same number
        of batches, of at most `micro_batch` rows, the last ones maybe of none."""
        if self.leaf is None:
            together = micro_batch * replicas
            return [range(first + replica, min(first + together, size), replicas) for first in range(0, size, together)]
        count = self.count(size)
        batches = [self.leaf_rows(size, leaf).tolist() for leaf in self.leaves_of(count, replica, replicas)]
        most = max(len(self.leaves_of(count, other, replicas)) for other in range(replicas))
        return batches + [[]] * (most - len(batches))

    def leaves_of(self, count: int, replica: int, replicas: int) -> tuple[int, ...]:
        """Returns the numbers of a replica's leaves, of `count`, in the order of computing them."""
        return _leaves_of(count, replica, replicas, self.neighbors)

    def leaf_rows(self, size: int, leaf: int) -> np.ndarray:
        """Returns the numbers of the rows of a leaf, in order."""
        return np.arange(leaf, size, self.count(size))

    def count(self, size: int) -> int:
        """Returns the number of leaves of a step of `size` rows."""
        assert self.leaf is not None
        return -(-size // self.leaf)


ROW_BY_ROW = Deal()


@lru_cache(maxsize=4096)
def _leaves_of(count: int, replica: int, replicas: int, neighbors: int) -> tuple[int, ...]:
    group, place = divmod(replica, neighbors)
    each = -(-count // (replicas // neighbors))
    return tuple(range(group * each + place, min((group + 1) * each, count), neighbors))
