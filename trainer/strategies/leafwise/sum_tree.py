"""Sums in one order, whoever computes the terms: a binary tree over the leaves of a step.

Floating-point addition is not associative, so a sum depends on who adds up what first. Here the order is that of a tree
over the numbers of the terms: the range of all leaves is halved, each half is halved again, down to single leaves.
A process adds up what it has of a branch, and what is missing comes from others: the same bits for any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Node = tuple[int, int]
"""The leaves of a branch: the first one, and the one behind the last."""
Values = Sequence[Tensor | None]
"""What is added up, tensor by tensor; None adds nothing."""


class SumTree:
    """The sum of the values of `leaves` leaves, which come in any order, each once.

    Branches are added up as soon as both halves are there, in place: of leaves that come one after the other at most
    log2(leaves) + 1 sums are kept.
    """

    def __init__(self, leaves: int):
        self.leaves = leaves
        self.sums: dict[Node, Values] = {}

    def add(self, node: Node, values: Values) -> None:
        """Adds the sum of a branch, or the values of a leaf, `(leaf, leaf + 1)`. They belong to the tree from now on:
        later sums are written into them. Raises ValueError for a node that it has not, or has already."""
        while node != (0, self.leaves):
            sibling, parent = find_sibling(node, self.leaves)
            if sibling not in self.sums:
                break
            values, node = _add(values, self.sums.pop(sibling)), parent
        if node in self.sums:
            raise ValueError(f"{node}: is there already")
        self.sums[node] = values

    @property
    def is_complete(self) -> bool:
        """Whether all leaves are there."""
        return (0, self.leaves) in self.sums

    def take_total(self) -> Values:
        """Returns the sum of all leaves, and forgets it. Raises KeyError where some are missing."""
        return self.sums.pop((0, self.leaves))


@lru_cache(maxsize=4096)
def find_branches(local: tuple[int, ...], leaves: int) -> list[Node]:
    """Returns the largest branches of a tree that are made of these leaves alone, in order."""
    tree = SumTree(leaves)
    for leaf in local:
        tree.add((leaf, leaf + 1), ())
    return sorted(tree.sums)


@lru_cache(maxsize=65536)
def find_sibling(node: Node, leaves: int) -> tuple[Node, Node]:
    """Returns the other half of the branch that `node` is a half of, and that branch. Raises ValueError if the tree has
    no such node."""
    first, end = 0, leaves
    while end - first > 1:
        middle = (first + end) // 2
        halves = (first, middle), (middle, end)
        if node in halves:
            return halves[node == halves[0]], (first, end)
        first, end = halves[node[0] >= middle]
    raise ValueError(f"{node}: not a node of a tree over {leaves} leaves")


@torch.no_grad()
def _add(values: Values, others: Values) -> Values:
    """Adds into `values` where there are two of a kind."""
    both = [(value, other) for value, other in zip(values, others, strict=True) if value is not None is not other]
    if both:
        torch._foreach_add_([value for value, _ in both], [other for _, other in both])
    return [other if value is None else value for value, other in zip(values, others, strict=True)]
