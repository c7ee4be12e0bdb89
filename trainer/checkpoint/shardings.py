"""How a tensor lies over ranks. A sharding holds for any shape: a mesh and its sharded dimensions describe all tensors
that are sharded this way, and cost as much for one tensor as for thousands.

- `MeshSharding`: a mesh of ranks. Along some of its dimensions the tensor is sharded (FSDP, tensor parallel), along the
others replicated; a tensor that several ranks hold whole lies on a mesh along which nothing is sharded.
- `EvenSharding`: flat stretches of equal length, one for each rank (ZeRO 3).
- `BoxSharding`: blocks listed one by one, where nothing shorter describes them (ZeRO 1 and 2; format version 2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed.tensor import DeviceMesh, Placement

from trainer.checkpoint.state import Box, Shape, chunk_bounds, flat_blocks, sharded_dims

Ints = NDArray[np.int64]
LARGEST = 1 << 62  # of a size or an offset
MOST_DIMENSIONS = 64  # torch has no more


class Table:
    """All blocks of a tensor of one shape: block i begins at `offset[i]` and has the size `size[i]`; the ranks
    `ranks[i]` hold it, one in each column. No block is empty. `disjoint`: no element can be in two blocks."""

    def __init__(self, offset: Ints, size: Ints, ranks: Ints, disjoint: bool = False):
        is_filled = size.all(axis=1)
        self.offset, self.size, self.ranks = offset[is_filled], size[is_filled], ranks[is_filled]
        self.disjoint = disjoint
        self._intersecting_rows: dict[Box, list[int]] = {}
        self._rows_by_replica: dict[int, dict[int, list[int]]] = {}
        self._rows_by_rank: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.offset)

    def box(self, row: int) -> Box:
        return Box(tuple(self.offset[row].tolist()), tuple(self.size[row].tolist()))

    @property
    def boxes(self) -> list[Box]:
        """Returns all blocks as boxes, which take much more memory than the table."""
        return [Box(tuple(a), tuple(n)) for a, n in zip(self.offset.tolist(), self.size.tolist(), strict=True)]

    def has_blocks_of(self, other: Table) -> bool:
        """Returns whether both tables have the same blocks in the same order."""
        return np.array_equal(self.offset, other.offset) and np.array_equal(self.size, other.size)

    @cached_property
    def numel(self) -> Ints:
        """Returns the number of elements of each block."""
        return self.size.prod(axis=1, dtype=np.int64)

    def rows_of(self, rank: int, replica: int) -> list[int]:
        """Returns the blocks that a rank holds in this column."""
        if replica not in self._rows_by_replica:
            rows: defaultdict[int, list[int]] = defaultdict(list)
            for row, holder in enumerate(self.ranks[:, replica].tolist()):
                rows[holder].append(row)
            self._rows_by_replica[replica] = dict(rows)
        return self._rows_by_replica[replica].get(rank, [])

    def rows_held_by(self, rank: int) -> list[int]:
        """Returns the blocks that a rank holds in any column."""
        if rank not in self._rows_by_rank:
            self._rows_by_rank[rank] = np.flatnonzero((self.ranks == rank).any(axis=1)).tolist()
        return self._rows_by_rank[rank]

    def rows_intersecting(self, box: Box) -> list[int]:
        """Returns the blocks that have elements in common with this one."""
        if box not in self._intersecting_rows:
            begin, size = np.array(box.offset, np.int64), np.array(box.size, np.int64)
            is_hit = (self.offset < begin + size).all(axis=1) & (begin < self.offset + self.size).all(axis=1)
            self._intersecting_rows[box] = np.flatnonzero(is_hit).tolist()
        return self._intersecting_rows[box]

    def raise_unless_whole(self, shape: Shape) -> None:
        """Raises ValueError unless the blocks cover a tensor of this shape, each element once."""
        if (self.offset + self.size > np.array(shape, np.int64)).any():
            raise ValueError("a shard lies outside of the tensor")
        if sum(self.numel.tolist()) != prod(shape) or (not self.disjoint and _overlap(self.boxes)):
            raise ValueError("its shards do not cover it exactly once")


class Sharding:
    """How a tensor of any shape lies over ranks. The table of each shape is made once."""

    _tables: dict[Shape, Table]

    def table(self, shape: Shape) -> Table:
        if shape not in self._tables:
            self._tables[shape] = self._make_table(shape)
        return self._tables[shape]

    def _make_table(self, shape: Shape) -> Table:
        raise NotImplementedError

    def cost(self, dims: int) -> int:
        """Returns an upper bound on how many numbers the table of a shape with `dims` dimensions has, without making
        it."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Returns the sharding as JSON, for `sharding_of`."""
        raise NotImplementedError


@dataclass(eq=False)
class MeshSharding(Sharding):
    """A tensor on a mesh of ranks. `shards`: pairs of a dimension of the mesh and the dimension of the tensor that is
    split along it, in the order of the splits (`state.sharded_dims`)."""

    mesh: Ints
    shards: tuple[tuple[int, int], ...] = ()
    _tables: dict[Shape, Table] = field(default_factory=dict, repr=False)

    @classmethod
    def from_placements(cls, mesh: DeviceMesh, placements: Sequence[Placement]) -> MeshSharding:
        """Returns the sharding of a DTensor with this mesh and these placements."""
        return cls(mesh.mesh.numpy().astype(np.int64), sharded_dims(placements))

    @cached_property
    def _ranks(self) -> Ints:
        """Returns the ranks with a row for each block and a column for each replica."""
        axes = [axis for axis, _ in self.shards]
        whole = [axis for axis in range(self.mesh.ndim) if axis not in axes]
        rows = prod(self.mesh.shape[axis] for axis in axes)
        return self.mesh.transpose([*axes, *whole]).reshape(rows, self.mesh.size // rows)

    def _make_table(self, shape: Shape) -> Table:
        counts = [self.mesh.shape[axis] for axis, _ in self.shards]
        numbers = np.unravel_index(np.arange(prod(counts)), counts) if counts else ()
        size = np.tile(np.array(shape, np.int64), (prod(counts), 1))
        offset = np.zeros_like(size)
        for (_, dim), count, number in zip(self.shards, counts, numbers, strict=True):
            if dim >= len(shape):
                raise ValueError("it is sharded in a dimension that it does not have")
            start, size[:, dim] = chunk_bounds(size[:, dim], count, number)
            offset[:, dim] += start
        return Table(offset, size, self._ranks, disjoint=True)

    def cost(self, dims: int) -> int:
        return self.mesh.size * (1 + 2 * dims)

    def to_json(self) -> dict[str, Any]:
        return {"mesh": self.mesh.tolist(), "shards": self.shards}


@dataclass(eq=False)
class EvenSharding(Sharding):
    """Rank r of `world` holds at most n elements of the flattened tensor, from r * n on, where n is as small as it can
    be. `ranks`: the ranks that hold their shard."""

    world: int
    ranks: list[int]
    _tables: dict[Shape, Table] = field(default_factory=dict, repr=False)

    @staticmethod
    def span(shape: Shape, rank: int, world: int) -> tuple[int, int]:
        """Returns the first element that a rank holds, and how many."""
        numel = prod(shape)
        length = -(-numel // world)
        return rank * length, min(length, max(0, numel - rank * length))

    def _make_table(self, shape: Shape) -> Table:
        rows = []
        for rank in self.ranks:
            start, count = self.span(shape, rank, self.world)
            rows += [(rank, box) for box in flat_blocks(shape, start, start + count)]
        return _table(rows, len(shape), disjoint=True)

    def cost(self, dims: int) -> int:
        return len(self.ranks) * max(1, 2 * dims) * (1 + 2 * dims)

    def to_json(self) -> dict[str, Any]:
        return {"even": self.world, "ranks": self.ranks}


@dataclass(eq=False)
class BoxSharding(Sharding):
    """A tensor whose blocks are listed one by one."""

    rows: list[tuple[int, Box]]  # (rank, block)
    _tables: dict[Shape, Table] = field(default_factory=dict, repr=False)

    def _make_table(self, shape: Shape) -> Table:
        if any(len(box.offset) != len(shape) or len(box.size) != len(shape) for _, box in self.rows):
            raise ValueError("a shard has other dimensions than the tensor")
        return _table(self.rows, len(shape))

    def cost(self, dims: int) -> int:
        return len(self.rows) * (1 + 2 * dims)

    def to_json(self) -> dict[str, Any]:
        return {"boxes": [[rank, *box] for rank, box in self.rows]}


def sharding_of(description: Any) -> Sharding:
    """Returns the sharding that `to_json` described. Raises ValueError or TypeError if it does not describe one."""
    match description:
        case {"mesh": mesh, "shards": shards}:
            ranks = np.array(mesh)
            if ranks.dtype != np.int64 or ranks.ndim == 0 or (ranks < 0).any() or len(np.unique(ranks)) != ranks.size:
                raise ValueError("a mesh is of ranks, each once")
            if not ranks.size or len({axis for axis, _ in shards}) != len(shards):
                raise ValueError("a mesh is cut along each of its dimensions once")
            if any(whole_number(axis) >= ranks.ndim for axis, _ in shards):
                raise ValueError("a mesh has fewer dimensions")
            return MeshSharding(ranks, tuple((axis, whole_number(dim)) for axis, dim in shards))
        case {"even": world, "ranks": list(ranks)}:
            if len(set(ranks)) != len(ranks) or any(whole_number(rank) >= whole_number(world) for rank in ranks):
                raise ValueError("shares are of ranks, each once")
            return EvenSharding(world, ranks)
        case {"boxes": list(rows)}:
            return BoxSharding(
                [(whole_number(rank), Box(whole_numbers(offset), whole_numbers(size))) for rank, offset, size in rows]
            )
    raise ValueError("a sharding is a mesh, even or boxes")


def whole_number(number: Any) -> int:
    if type(number) is not int or not 0 <= number < LARGEST:
        raise ValueError("sizes and offsets are whole numbers")
    return number


def shape_from(numbers: Any) -> Shape:
    """Returns `numbers` as a shape. Raises ValueError or TypeError if they are not the shape of a tensor."""
    if len(numbers) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has at most {MOST_DIMENSIONS} dimensions")
    return whole_numbers(numbers)


def whole_numbers(numbers: Any) -> Shape:
    return tuple(map(whole_number, numbers))


def _table(rows: Sequence[tuple[int, Box]], dims: int, disjoint: bool = False) -> Table:
    offset = np.array([box.offset for _, box in rows], np.int64).reshape(len(rows), dims)
    size = np.array([box.size for _, box in rows], np.int64).reshape(len(rows), dims)
    ranks = np.array([rank for rank, _ in rows], np.int64).reshape(len(rows), 1)
    return Table(offset, size, ranks, disjoint)


def _overlap(boxes: Sequence[Box]) -> bool:
    """Returns whether an element is in two boxes. Sorted by their offsets, only a few are neighbors in dimension 0."""
    neighbors: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset):
        neighbors = [near for near in neighbors if not box.offset or near.offset[0] + near.size[0] > box.offset[0]]
        if any(box.intersect(near) for near in neighbors):
            return True
        neighbors.append(box)
    return False
