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
        self._shards: dict[str, set[Shard]] | None = None

    def find_differing(self, state: State) -> list[int] | None:
        """Returns the ranks whose weights differ from their replicas, or None if there are none. In a group without a
        majority these are all of the group. All ranks call it and get the same result."""
        shards_and_tensors = local_shards(state)
        if self._shards is None:
            shared = Plan.from_state(state, self.topology).replicated_shards(self.topology.rank)
            self._shards = {group: set(group_shards) for group, group_shards in shared.items()}
        local_prints = {
            group: int(fingerprint([tensor for shard, tensor in shards_and_tensors if shard in group_shards]))
            for group, group_shards in self._shards.items()
        }
        groups: defaultdict[str, dict[int, int]] = defaultdict(dict)
        for rank, prints in enumerate(self.topology.gather(local_prints)):
            for group, print_ in prints.items():
                groups[group][rank] = print_
        differing = {rank for prints in groups.values() for rank in _find_minority(prints)}
        return sorted(differing) or None


def _find_minority(prints: dict[int, int]) -> list[int]:
    (majority, count), *minorities = Counter(prints.values()).most_common()
    if minorities and count * 2 <= len(prints):
        return list(prints)
    return [rank for rank, print_ in prints.items() if print_ != majority]
