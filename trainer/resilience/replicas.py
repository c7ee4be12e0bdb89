"""Silent corruption: weights that several processes hold must have the same bits on all of them.

Dixit et al. 2021 ("Silent data corruptions at scale"): processors and memory that compute wrongly without any error.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from trainer.checkpoint.plan import Plan, Shard, fingerprint, local_shards
from trainer.checkpoint.state import State
from trainer.topology import Topology


class Replicas:
    def __init__(self, topology: Topology):
        self.topology = topology
        self._pieces: dict[str, set[Shard]] | None = None

    def find_differing(self, state: State) -> list[int] | None:
        """The ranks that hold other weights than those they share them with; None if there are none. All of a group
        where it has no majority. All ranks call it, and hear the same."""
        held = local_shards(state)
        if self._pieces is None:
            shared = Plan.of(state, self.topology).replicated_shards(self.topology.rank)
            self._pieces = {group: set(shards) for group, shards in shared.items()}
        prints_here = {
            group: int(fingerprint([tensor for piece, tensor in held if piece in shards]))
            for group, shards in self._pieces.items()
        }
        groups: defaultdict[str, dict[int, int]] = defaultdict(dict)
        for rank, prints in enumerate(self.topology.gather(prints_here)):
            for group, print_ in prints.items():
                groups[group][rank] = print_
        differing = {rank for prints in groups.values() for rank in _minority(prints)}
        return sorted(differing) or None


def _minority(prints: dict[int, int]) -> list[int]:
    (most, count), *others = Counter(prints.values()).most_common()
    if others and count * 2 <= len(prints):
        return list(prints)
    return [rank for rank, print_ in prints.items() if print_ != most]
