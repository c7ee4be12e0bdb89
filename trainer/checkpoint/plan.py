"""Who writes what: of all processes that hold a piece, one writes it. Made once a run, the same on every process.

What ranks hold follows from few descriptions (a mesh, an even split) that thousands of tensors and ranks share. They
are exchanged, each distinct one once; then every rank computes the plan of all and the pieces of its own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.checkpoint.format import LARGEST_TABLES, StoredTensor, header, key_of, table_numbers
from trainer.checkpoint.shardings import BoxSharding, EvenSharding, Ints, MeshSharding, Sharding, Table, sharding_of
from trainer.checkpoint.state import DTYPES, NAMES, Box, FlatShard, State, dtype_of, is_weight, shape_of, shards_of
from trainer.errors import TrainingError
from trainer.topology import Topology

SMALL = 1 << 16  # bytes; the bits of smaller tensors are summed up together
WRITERS = 64  # of the replicas of a tensor, so many may be asked to write it: whoever reads all opens no more files


class Shard(NamedTuple):
    """A shard of a tensor: one block of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.numel * DTYPES[self.dtype].itemsize


def local_shards(state: State) -> list[tuple[Shard, Tensor]]:
    """All that this process holds, as views of its memory. TrainingError for a type that cannot be saved."""
    found = []
    for name, value in state.items():
        dtype, shape = dtype_of(value), shape_of(value)
        if dtype not in NAMES:
            raise TrainingError(f"'{name}' is {dtype}, which no checkpoint holds")
        found += [(Shard(name, NAMES[dtype], shape, box), tensor.detach()) for box, tensor in shards_of(value)]
    return found


Description = tuple[Any, Any, list[Any]]
Sections = dict[str, str]
"""What a rank holds: descriptions of tensors that lie alike, JSON by its digest. Most are the same on many ranks."""


def describe_state(state: State, rank: int, world: int) -> Sections:
    """`state` as the rank `rank` of `world` holds it."""
    rows: defaultdict[tuple[str, Any], list[Any]] = defaultdict(list)
    shardings: dict[Any, Any] = {}
    grids: dict[Any, Any] = {}
    for name, value in state.items():
        key, sharding, blocks = _describe_tensor(value, rank, world, grids)
        if sharding is not None:
            shardings[key] = sharding
            rows[name.rpartition("/")[0], key].append([name, NAMES[dtype_of(value)], shape_of(value), *blocks])
    texts = [json.dumps([shardings[key], its], separators=(",", ":")) for (_, key), its in rows.items()]
    return dict(sorted((_digest(text), text) for text in texts))


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _describe_tensor(value: Tensor | FlatShard, rank: int, world: int, grids: dict[Any, Any]) -> Description:
    """What tensors of one sharding have in common, the sharding as JSON (None where nothing is held), and the blocks of
    a tensor that no sharding describes."""
    shape = shape_of(value)
    if isinstance(value, FlatShard):
        if (value.start, len(value.values)) == EvenSharding.span(shape, rank, world):
            return "even", {"even": world}, []
    elif not isinstance(value, DTensor):
        return "whole", {}, []
    else:
        key = value.device_mesh, value.placements
        if key not in grids:
            grids[key] = MeshSharding.of(*key).to_json()
        return key, grids[key], []
    boxes = [box for box, _ in shards_of(value)]
    return "boxes", {"boxes": []} if boxes else None, [boxes]


def exchange(sections: Sections, topology: Topology) -> list[tuple[list[int], Any]]:
    """Returns all ranks' sections, each once, with the ranks that have it; only the first of these sends it."""
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for rank, digests in enumerate(topology.gather(list(sections))):
        for digest in digests:
            holders[digest].append(rank)
    own = [text for digest, text in sections.items() if holders[digest][0] == topology.rank]
    texts = [text for part in topology.gather(own) for text in part]
    return [(holders[_digest(text)], json.loads(text)) for text in texts]


class Holding(NamedTuple):
    """A tensor, and how ranks hold it: more than one sharding where several groups do (both ends of a pipeline, or the
    ranks of tensor parallel that do not split it)."""

    dtype: str
    shape: tuple[int, ...]
    shardings: list[Sharding]


def holdings(shared: Sequence[tuple[list[int], Any]]) -> dict[str, Holding]:
    """Returns each tensor's holding, by name. Raises TrainingError if ranks disagree on its type or shape."""
    found: dict[str, Holding] = {}
    for ranks, (description, rows) in shared:
        sharding = _sharding(description, ranks)
        for name, dtype, shape, *blocks in rows:
            holding = found.setdefault(name, Holding(dtype, tuple(shape), []))
            if (holding.dtype, holding.shape) != (dtype, tuple(shape)):
                one, another = f"{holding.dtype} {list(holding.shape)}", f"{dtype} {list(shape)}"
                raise TrainingError(f"'{name}' is {one} on one process, {another} on another")
            holding.shardings.append(sharding or _boxes(ranks, blocks[0]))
    return {name: holding for name, holding in found.items() if 0 not in holding.shape}


def _sharding(description: Any, ranks: list[int]) -> Sharding | None:
    """None where each tensor has its own."""
    match description:
        case {"boxes": _}:
            return None
        case {"even": world}:
            return EvenSharding(world, ranks)
        case {"mesh": _}:
            return sharding_of(description)
    return MeshSharding(np.array(ranks))


def _boxes(ranks: list[int], blocks: Any) -> Sharding:
    return BoxSharding([(ranks[0], Box(tuple(offset), tuple(size))) for offset, size in blocks])


@dataclass(frozen=True)
class Plan:
    """`tensors`: what the index will say. `tables`: who holds what of each. `sizes`: bytes that each rank writes behind
    the header of its file."""

    tensors: dict[str, StoredTensor]
    tables: dict[str, Table]
    sizes: Ints

    @classmethod
    def of(cls, state: State, topology: Topology) -> Plan:
        """All ranks call it. Raises TrainingError for a state that cannot be saved."""
        shared = exchange(describe_state(state, topology.rank, topology.world_size), topology)
        return cls.from_holdings(holdings(shared), topology.world_size)

    @classmethod
    def from_holdings(cls, held: Mapping[str, Holding], world: int) -> Plan:
        """Plans who writes what: a shard that several ranks hold is written by the one with the least to write."""
        tables = dict(_tables(held))
        sizes, tensors = np.zeros(world, np.int64), {}
        nbytes = {name: prod(it.shape) * DTYPES[it.dtype].itemsize for name, it in held.items()}
        for name in sorted(held, key=lambda name: (tables[name].ranks.shape[1] > 1, -nbytes[name], name)):
            dtype, shape, shardings = held[name]
            table = tables[name]
            count = table.ranks.shape[1]
            replicas = np.arange(min(count, WRITERS)) * count // min(count, WRITERS)
            busiest = sizes[table.ranks[:, replicas]].max(axis=0)
            replica = int(replicas[busiest.argmin()]) if shape else 0  # counts of steps lie together, in one file more
            np.add.at(sizes, table.ranks[:, replica], table.numel * DTYPES[dtype].itemsize)
            tensors[name] = StoredTensor(dtype, shape, *_sharding_of_replica(shardings, shape, table, replica))
        if table_numbers(tensors) > LARGEST_TABLES:
            raise TrainingError(
                "the run's state cannot be saved: it is cut into more pieces than a checkpoint can have"
            )
        return cls(tensors, tables, sizes)

    def file(self, rank: int) -> list[tuple[Shard, int]]:
        """Returns the shards that a rank writes, in order, each with its first byte after the header."""
        own = [
            Shard(name, stored.dtype, stored.shape, box)
            for name, stored in self.tensors.items()
            for box in stored.written_by(rank)
        ]
        return _lay_out(own)

    def replicated_shards(self, rank: int) -> dict[str, list[Shard]]:
        """What this process has to agree on with others, by a digest of who they are: weights, which show the rest
        too."""
        found: defaultdict[str, list[Shard]] = defaultdict(list)
        groups: dict[tuple[Table, int], str] = {}
        for name, table in self.tables.items():
            if not is_weight(name) or table.ranks.shape[1] == 1:
                continue
            for row in table.rows_held_by(rank):
                if (table, row) not in groups:
                    holders = np.unique(table.ranks[row])
                    groups[table, row] = xxhash.xxh3_64_hexdigest(holders.tobytes()) if len(holders) > 1 else ""
                if group := groups[table, row]:
                    stored = self.tensors[name]
                    found[group].append(Shard(name, stored.dtype, stored.shape, table.box(row)))
        return found


def _tables(held: Mapping[str, Holding]) -> Iterator[tuple[str, Table]]:
    """Made and checked once for all tensors of one shape that lie alike."""
    made: dict[Any, Table] = {}
    for name, (_, shape, shardings) in held.items():
        key = shape, *shardings
        if key not in made:
            made[key] = _merged([sharding.table(shape) for sharding in shardings], shape)
            try:
                made[key].raise_unless_whole(shape)
            except ValueError as error:
                raise TrainingError(f"'{name}' cannot be saved, of what all processes hold of it {error}") from None
        yield name, made[key]


def _merged(tables: Sequence[Table], shape: tuple[int, ...]) -> Table:
    """One of all: of the same blocks the holders beside each other, of others the blocks behind each other."""
    first = tables[0]
    if all(table.has_blocks_of(first) for table in tables):
        ranks = np.hstack([table.ranks for table in tables])
        return first if len(tables) == 1 else Table(first.offset, first.size, ranks, first.disjoint)
    holders: defaultdict[Box, list[int]] = defaultdict(list)
    for table in tables:
        for box, ranks in zip(table.boxes, table.ranks.tolist(), strict=True):
            holders[box] += ranks
    width = max(map(len, holders.values()))
    columns = [(its * width)[:width] for its in holders.values()]  # a table has as many columns in each row
    offset, size = (np.array([box[i] for box in holders], np.int64).reshape(len(holders), len(shape)) for i in (0, 1))
    return Table(offset, size, np.array(columns))


def _sharding_of_replica(
    shardings: Sequence[Sharding], shape: tuple[int, ...], table: Table, replica: int
) -> tuple[Sharding, int]:
    """Returns the sharding and replica as the index records them: one of the shardings, or block by block."""
    if all(sharding.table(shape).has_blocks_of(table) for sharding in shardings):
        for sharding in shardings:
            if replica < (columns := sharding.table(shape).ranks.shape[1]):
                return sharding, replica
            replica -= columns
    return BoxSharding(list(zip(table.ranks[:, replica].tolist(), table.boxes, strict=True))), 0


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all their bits, read as integers: an int64 scalar where the tensors lie; only it is ever fetched. The
    sums of two lists add up to that of both."""
    few = [tensor.nbytes < SMALL and tensor.nbytes % 8 == 0 for tensor in tensors]
    small = [tensor.reshape(-1).view(torch.uint8) for tensor, is_few in zip(tensors, few, strict=True) if is_few]
    sums = [_words(tensor) for tensor, is_few in zip(tensors, few, strict=True) if not is_few]
    sums += [_words(torch.cat(small))] if small else []
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8:
        flat = flat.clone()  # a view of words begins at one
    end = flat.numel() // 8 * 8
    return flat[:end].view(torch.int64).sum() + flat[end:].sum(dtype=torch.int64)


def fingerprint_of(state: State) -> Tensor:
    """Returns the fingerprint of this rank's weights: an integer below 2^40 as a float64 scalar, so that many can be
    summed."""
    weights = [tensor for piece, tensor in local_shards(state) if is_weight(piece.name)]
    return fingerprint(weights).remainder(1 << 40).double()


def _lay_out(its: Sequence[Shard]) -> list[tuple[Shard, int]]:
    """Wide types first: then each piece begins at a multiple of its own type's size."""
    at, found = 0, []
    for piece in sorted(its, key=lambda piece: (-DTYPES[piece.dtype].itemsize, piece)):
        found.append((piece, at))
        at += piece.nbytes
    return found


def header_of(file: Sequence[tuple[Shard, int]], about: dict[str, str]) -> bytes:
    """The beginning of a file of these pieces."""
    return header([(key_of(its.name, its.shape, its.box), its.dtype, its.box, at) for its, at in file], about)
