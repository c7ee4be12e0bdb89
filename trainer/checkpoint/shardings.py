"""How a tensor lies over ranks. A sharding holds for any shape: what is said of a mesh and its sharded dimensions is
said of all tensors that are sharded so, and costs as much for one tensor as for thousands.

- `MeshSharding`: a mesh of ranks. Along some of its dimensions the tensor is sharded (FSDP, tensor parallel), along the
others replicated; one that several ranks hold whole lies on a mesh along which nothing is sharded.
- `EvenSharding`: flat stretches of equal length, one a rank (ZeRO 3).
- `BoxSharding`: blocks told one by one, where nothing shorter describes them (ZeRO 1 and 2; format version 2).
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
    """All blocks of a tensor of one shape: block i begins at `offset[i]` and is `size[i]` large; the ranks `ranks[i]`
    hold it, one in each column. No block is empty. `disjoint`: no element can be in two of them."""

    def __init__(self, offset: Ints, size: Ints, ranks: Ints, disjoint: bool = False):
        filled = size.all(axis=1)
        self.offset, self.size, self.ranks = offset[filled], size[filled], ranks[filled]
        self.disjoint = disjoint
        self._meeting: dict[Box, list[int]] = {}
        self._rows: dict[int, dict[int, list[int]]] = {}
        self._held: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.offset)

    def box(self, row: int) -> Box:
        return Box(tuple(self.offset[row].tolist()), tuple(self.size[row].tolist()))

    @property
    def boxes(self) -> list[Box]:
        """All of them: much larger than the table."""
        return [Box(tuple(a), tuple(n)) for a, n in zip(self.offset.tolist(), self.size.tolist(), strict=True)]

    def has_blocks_of(self, other: Table) -> bool:
        """Whether both have the same blocks in the same order."""
        return np.array_equal(self.offset, other.offset) and np.array_equal(self.size, other.size)

    @cached_property
    def numel(self) -> Ints:
        """Returns the number of elements of each block."""
        return self.size.prod(axis=1, dtype=np.int64)

    def rows_of(self, rank: int, replica: int) -> list[int]:
        """The blocks that a rank holds in this column."""
        if replica not in self._rows:
            rows: defaultdict[int, list[int]] = defaultdict(list)
            for row, holder in enumerate(self.ranks[:, replica].tolist()):
                rows[holder].append(row)
            self._rows[replica] = dict(rows)
        return self._rows[replica].get(rank, [])

    def rows_held_by(self, rank: int) -> list[int]:
        """The blocks that a rank holds in any column."""
        if rank not in self._held:
            self._held[rank] = np.flatnonzero((self.ranks == rank).any(axis=1)).tolist()
        return self._held[rank]

    def intersecting(self, box: Box) -> list[int]:
        """The blocks that have elements in common with this one."""
        if box not in self._meeting:
            begin, size = np.array(box.offset, np.int64), np.array(box.size, np.int64)
            hit = (self.offset < begin + size).all(axis=1) & (begin < self.offset + self.size).all(axis=1)
            self._meeting[box] = np.flatnonzero(hit).tolist()
        return self._meeting[box]

    def raise_unless_whole(self, shape: Shape) -> None:
        """Raises ValueError unless the blocks make up a tensor of this shape, each element once."""
        if (self.offset + self.size > np.array(shape, np.int64)).any():
            raise ValueError("a piece lies outside")
        if sum(self.numel.tolist()) != prod(shape) or (not self.disjoint and _overlap(self.boxes)):
            raise ValueError("its pieces do not make it up")


class Sharding:
    """Tables are made once a shape."""

    _tables: dict[Shape, Table]

    def table(self, shape: Shape) -> Table:
        if shape not in self._tables:
            self._tables[shape] = self._made(shape)
        return self._tables[shape]

    def _made(self, shape: Shape) -> Table:
        raise NotImplementedError

    def cost(self, dims: int) -> int:
        """How many numbers the table of a shape of so many dimensions has at most, known before it is made."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Returns the sharding as JSON, for `sharding_of`."""
        raise NotImplementedError


@dataclass(eq=False)
class MeshSharding(Sharding):
    """`shards`: pairs of a dimension of the mesh and the one of the tensor that is cut along it, in the order of the
    cuts (`pieces.cut`)."""

    mesh: Ints
    shards: tuple[tuple[int, int], ...] = ()
    _tables: dict[Shape, Table] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, mesh: DeviceMesh, placements: Sequence[Placement]) -> MeshSharding:
        """Returns the sharding of a DTensor with this mesh and these placements."""
        return cls(mesh.mesh.numpy().astype(np.int64), sharded_dims(placements))

    @cached_property
    def _ranks(self) -> Ints:
        """One row a block, with a column a replica."""
        axes = [axis for axis, _ in self.shards]
        whole = [axis for axis in range(self.mesh.ndim) if axis not in axes]
        rows = prod(self.mesh.shape[axis] for axis in axes)
        return self.mesh.transpose([*axes, *whole]).reshape(rows, self.mesh.size // rows)

    def _made(self, shape: Shape) -> Table:
        counts = [self.mesh.shape[axis] for axis, _ in self.shards]
        numbers = np.unravel_index(np.arange(prod(counts)), counts) if counts else ()
        size = np.tile(np.array(shape, np.int64), (prod(counts), 1))
        offset = np.zeros_like(size)
        for (_, dim), count, number in zip(self.shards, counts, numbers, strict=True):
            if dim >= len(shape):
                raise ValueError("it is sharded in a dimension that it has not")
            start, size[:, dim] = chunk_bounds(size[:, dim], count, number)
            offset[:, dim] += start
        return Table(offset, size, self._ranks, disjoint=True)

    def cost(self, dims: int) -> int:
        return self.mesh.size * (1 + 2 * dims)

    def to_json(self) -> dict[str, Any]:
        return {"mesh": self.mesh.tolist(), "shards": self.shards}


@dataclass(eq=False)
class EvenSharding(Sharding):
    """Rank r of `world` holds the elements from r * n on, n at most, of the flattened tensor, where n is as small as it
    can be. `ranks`: those of them that hold their share."""

    world: int
    ranks: list[int]
    _tables: dict[Shape, Table] = field(default_factory=dict, repr=False)

    @staticmethod
    def span(shape: Shape, rank: int, world: int) -> tuple[int, int]:
        """First element and how many."""
        numel = prod(shape)
        length = -(-numel // world)
        return rank * length, min(length, max(0, numel - rank * length))

    def _made(self, shape: Shape) -> Table:
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
    rows: list[tuple[int, Box]]  # which rank, which block
    _tables: dict[Shape, Table] = field(default_factory=dict, repr=False)

    def _made(self, shape: Shape) -> Table:
        if any(len(box.offset) != len(shape) or len(box.size) != len(shape) for _, box in self.rows):
            raise ValueError("a piece has other dimensions")
        return _table(self.rows, len(shape))

    def cost(self, dims: int) -> int:
        return len(self.rows) * (1 + 2 * dims)

    def to_json(self) -> dict[str, Any]:
        return {"boxes": [[rank, *box] for rank, box in self.rows]}


def sharding_of(told: Any) -> Sharding:
    """Raises ValueError or TypeError for what describes none."""
    match told:
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
    """Raises ValueError or TypeError for what is not the shape of a tensor."""
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
    """Whether an element is in two of them. Sorted by where they begin, only a few lie beside each other."""
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset):
        beside = [other for other in beside if not box.offset or other.offset[0] + other.size[0] > box.offset[0]]
        if any(box.intersect(other) for other in beside):
            return True
        beside.append(box)
    return False
