"""The plan of which rank writes what: of all ranks that hold a shard, one writes it. Made once a run, the same on all.

What ranks hold follows from few descriptions (a mesh, an even split) that thousands of tensors and ranks share. They
are exchanged, each distinct one once; then every rank computes the plan of all ranks and the shards of its own file.
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

SMALL = 1 << 16  # bytes; smaller tensors are concatenated before their bits are summed
WRITERS = 64  # replicas of a tensor that may write it, so that a process that reads all of it opens no more files


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
    """Returns all shards that this process holds, as views of its memory. Raises TrainingError for a type that cannot
    be saved."""
    shards = []
    for name, value in state.items():
        dtype, shape = dtype_of(value), shape_of(value)
        if dtype not in NAMES:
            raise TrainingError(f"'{name}' is {dtype}, which no checkpoint holds")
        shards += [(Shard(name, NAMES[dtype], shape, box), tensor.detach()) for box, tensor in shards_of(value)]
    return shards


Description = tuple[Any, Any, list[Any]]
Sections = dict[str, str]
"""What a rank holds: descriptions of tensors with one sharding, JSON by its digest. Most are the same on many ranks."""


def describe_state(state: State, rank: int, world: int) -> Sections:
    """Describes `state` as the rank `rank` of `world` holds it."""
    rows: defaultdict[tuple[str, Any], list[Any]] = defaultdict(list)
    shardings: dict[Any, Any] = {}
    grids: dict[Any, Any] = {}
    for name, value in state.items():
        key, sharding, blocks = _describe_tensor(value, rank, world, grids)
        if sharding is not None:
            shardings[key] = sharding
            rows[name.rpartition("/")[0], key].append([name, NAMES[dtype_of(value)], shape_of(value), *blocks])
    texts = [json.dumps([shardings[key], group], separators=(",", ":")) for (_, key), group in rows.items()]
    return dict(sorted((_digest(text), text) for text in texts))


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _describe_tensor(value: Tensor | FlatShard, rank: int, world: int, grids: dict[Any, Any]) -> Description:
    """Returns a key that tensors of one sharding share, the sharding as JSON (None if nothing is held), and the blocks
    of a tensor that no sharding describes."""
    shape = shape_of(value)
    if isinstance(value, FlatShard):
        if (value.start, len(value.values)) == EvenSharding.span(shape, rank, world):
            return "even", {"even": world}, []
    elif not isinstance(value, DTensor):
        return "whole", {}, []
    else:
        key = value.device_mesh, value.placements
        if key not in grids:
            grids[key] = MeshSharding.from_placements(*key).to_json()
        return key, grids[key], []
    boxes = [box for box, _ in shards_of(value)]
    return "boxes", {"boxes": []} if boxes else None, [boxes]


def exchange(sections: Sections, topology: Topology) -> list[tuple[list[int], Any]]:
    """Returns all ranks' sections, each once, with the ranks that have it; only the first of them sends it."""
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for rank, digests in enumerate(topology.gather(list(sections))):
        for digest in digests:
            holders[digest].append(rank)
    local_texts = [text for digest, text in sections.items() if holders[digest][0] == topology.rank]
    texts = [text for rank_texts in topology.gather(local_texts) for text in rank_texts]
    return [(holders[_digest(text)], json.loads(text)) for text in texts]


class Holding(NamedTuple):
    """How ranks hold a tensor: with more than one sharding where several groups hold it (both ends of a pipeline, or
    the ranks of tensor parallel that do not split it)."""

    dtype: str
    shape: tuple[int, ...]
    shardings: list[Sharding]


def collect_holdings(sections: Sequence[tuple[list[int], Any]]) -> dict[str, Holding]:
    """Returns each tensor's holding, by name. Raises TrainingError if ranks disagree on its type or shape."""
    holdings: dict[str, Holding] = {}
    for ranks, (description, rows) in sections:
        sharding = _sharding(description, ranks)
        for name, dtype, shape, *blocks in rows:
            holding = holdings.setdefault(name, Holding(dtype, tuple(shape), []))
            if (holding.dtype, holding.shape) != (dtype, tuple(shape)):
                first, second = f"{holding.dtype} {list(holding.shape)}", f"{dtype} {list(shape)}"
                raise TrainingError(f"'{name}' is {first} on one process, {second} on another")
            holding.shardings.append(sharding or _box_sharding(ranks, blocks[0]))
    return {name: holding for name, holding in holdings.items() if 0 not in holding.shape}


def _sharding(description: Any, ranks: list[int]) -> Sharding | None:
    """Returns the sharding that all tensors of a section share; None if each has its own."""
    match description:
        case {"boxes": _}:
            return None
        case {"even": world}:
            return EvenSharding(world, ranks)
        case {"mesh": _}:
            return sharding_of(description)
    return MeshSharding(np.array(ranks))


def _box_sharding(ranks: list[int], blocks: Any) -> Sharding:
    return BoxSharding([(ranks[0], Box(tuple(offset), tuple(size))) for offset, size in blocks])


@dataclass(frozen=True)
class Plan:
    """The plan of a save. `tensors`: what the index will say. `tables`: which ranks hold which blocks of each tensor.
    `sizes`: bytes that each rank writes after the header of its file."""

    tensors: dict[str, StoredTensor]
    tables: dict[str, Table]
    sizes: Ints

    @classmethod
    def from_state(cls, state: State, topology: Topology) -> Plan:
        """Returns the plan for this state. All ranks call it. Raises TrainingError for a state that cannot be saved."""
        sections = exchange(describe_state(state, topology.rank, topology.world_size), topology)
        return cls.from_holdings(collect_holdings(sections), topology.world_size)

    @classmethod
    def from_holdings(cls, holdings: Mapping[str, Holding], world: int) -> Plan:
        """Returns the plan in which a shard that several ranks hold is written by the one with the least to write."""
        tables = dict(_make_tables(holdings))
        sizes, tensors = np.zeros(world, np.int64), {}
        nbytes = {name: prod(holding.shape) * DTYPES[holding.dtype].itemsize for name, holding in holdings.items()}
        for name in sorted(holdings, key=lambda name: (tables[name].ranks.shape[1] > 1, -nbytes[name], name)):
            dtype, shape, shardings = holdings[name]
            table = tables[name]
            count = table.ranks.shape[1]
            replicas = np.arange(min(count, WRITERS)) * count // min(count, WRITERS)
            busiest = sizes[table.ranks[:, replicas]].max(axis=0)
            replica = int(replicas[busiest.argmin()]) if shape else 0  # scalars (step counts) share one file
            np.add.at(sizes, table.ranks[:, replica], table.numel * DTYPES[dtype].itemsize)
            tensors[name] = StoredTensor(dtype, shape, *_sharding_of_replica(shardings, shape, table, replica))
        if table_numbers(tensors) > LARGEST_TABLES:
            raise TrainingError("the run's state cannot be saved: it has more shards than a checkpoint can have")
        return cls(tensors, tables, sizes)

    def file(self, rank: int) -> list[tuple[Shard, int]]:
        """Returns the shards that a rank writes, in order, each with its first byte after the header."""
        shards = [
            Shard(name, stored.dtype, stored.shape, box)
            for name, stored in self.tensors.items()
            for box in stored.boxes_written_by(rank)
        ]
        return _lay_out(shards)

    def replicated_shards(self, rank: int) -> dict[str, list[Shard]]:
        """Returns the shards that a rank has to hold alike with others, by a digest of the ranks that hold them:
        weights only, which show an error in the rest of the state, too."""
        shards: defaultdict[str, list[Shard]] = defaultdict(list)
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
                    shards[group].append(Shard(name, stored.dtype, stored.shape, table.box(row)))
        return shards


def _make_tables(holdings: Mapping[str, Holding]) -> Iterator[tuple[str, Table]]:
    """Yields each tensor's table, which is made and checked once for all tensors of one shape and sharding."""
    tables: dict[Any, Table] = {}
    for name, (_, shape, shardings) in holdings.items():
        key = shape, *shardings
        if key not in tables:
            tables[key] = _merge_tables([sharding.table(shape) for sharding in shardings], shape)
            try:
                tables[key].raise_unless_whole(shape)
            except ValueError as error:
                raise TrainingError(f"'{name}' cannot be saved: {error}") from None
        yield name, tables[key]


def _merge_tables(tables: Sequence[Table], shape: tuple[int, ...]) -> Table:
    """Merges tables of one tensor: more columns where all have the same blocks, more rows otherwise."""
    first = tables[0]
    if all(table.has_blocks_of(first) for table in tables):
        ranks = np.hstack([table.ranks for table in tables])
        return first if len(tables) == 1 else Table(first.offset, first.size, ranks, first.disjoint)
    holders: defaultdict[Box, list[int]] = defaultdict(list)
    for table in tables:
        for box, ranks in zip(table.boxes, table.ranks.tolist(), strict=True):
            holders[box] += ranks
    width = max(map(len, holders.values()))
    padded = [(ranks * width)[:width] for ranks in holders.values()]  # each row of a table has as many columns
    offset, size = (np.array([box[i] for box in holders], np.int64).reshape(len(holders), len(shape)) for i in (0, 1))
    return Table(offset, size, np.array(padded))


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
    """Returns the sum of all bits of the tensors, read as integers: an int64 scalar on their device. The sums of two
    lists add up to that of both."""
    flags = [tensor.nbytes < SMALL and tensor.nbytes % 8 == 0 for tensor in tensors]
    small = [tensor.reshape(-1).view(torch.uint8) for tensor, is_small in zip(tensors, flags, strict=True) if is_small]
    sums = [_sum_words(tensor) for tensor, is_small in zip(tensors, flags, strict=True) if not is_small]
    sums += [_sum_words(torch.cat(small))] if small else []
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def _sum_words(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8:
        flat = flat.clone()  # a view of words begins at one
    end = flat.numel() // 8 * 8
    return flat[:end].view(torch.int64).sum() + flat[end:].sum(dtype=torch.int64)


def fingerprint_of(state: State) -> Tensor:
    """Returns the fingerprint of this rank's weights: an integer below 2^40 as a float64 scalar, so that many can be
    summed."""
    weights = [tensor for shard, tensor in local_shards(state) if is_weight(shard.name)]
    return fingerprint(weights).remainder(1 << 40).double()


def _lay_out(shards: Sequence[Shard]) -> list[tuple[Shard, int]]:
    """Returns each shard with its first byte: wide types first, so that each begins at a multiple of its item size."""
    offset, layout = 0, []
    for shard in sorted(shards, key=lambda shard: (-DTYPES[shard.dtype].itemsize, shard)):
        layout.append((shard, offset))
        offset += shard.nbytes
    return layout


def header_of(file: Sequence[tuple[Shard, int]], metadata: dict[str, str]) -> bytes:
    """Returns the header of a file of these shards."""
    entries = [(key_of(shard.name, shard.shape, shard.box), shard.dtype, shard.box, begin) for shard, begin in file]
    return header(entries, metadata)
