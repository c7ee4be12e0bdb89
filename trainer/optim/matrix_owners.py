"""A function of whole matrices that are sharded over processes: each matrix is brought to one process, its owner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

BUCKET_BYTES = 64 * 2**20  # of the whole matrices that a process owns at a time, if more than one

Make = Callable[[int], Tensor]  # the matrix of a number, sharded as the parameter of that number is
Function = Callable[[Tensor], Tensor]  # of a whole matrix; its value is as large, and of the same type


class Sharding(NamedTuple):
    """How parameters are sharded: mesh dimension, data type and device."""

    mesh: DeviceMesh
    dimension: int
    dtype: torch.dtype
    device: torch.device


def map_whole_matrices(parameters: Sequence[Tensor], make: Make, function: Function) -> Iterator[tuple[int, Tensor]]:
    """The number of each parameter and `function` of the matrix that is made for it, sharded as the parameter is.

    Where one mesh dimension shards a parameter, the owner alone has its matrix whole, and a bucket of them is made and
    sent at once. One that several dimensions shard (FSDP with tensor parallel) is gathered everywhere. Who computes
    what follows from the shapes, so a resumed run has the same bits.
    """
    together: dict[Sharding, list[Entry]] = {}
    for number, parameter in enumerate(parameters):
        if not isinstance(parameter, DTensor):
            yield number, function(make(number))
        elif (sharding := _sharding(parameter)) is not None:
            together.setdefault(sharding, []).append((number, parameter))
        else:
            yield number, _gathered(make(number), parameter, function)
    for sharding, entries in together.items():
        for bucket in _buckets(entries, sharding.mesh.size(sharding.dimension)):
            yield from _map_bucket(bucket, sharding, make, function)


def _sharding(parameter: DTensor) -> Sharding | None:
    """Returns how a parameter is sharded, if one mesh dimension shards it by rows or columns."""
    mesh, placements = parameter.device_mesh, parameter.placements
    split = [d for d in range(mesh.ndim) if mesh.size(d) > 1 and not placements[d].is_replicate()]
    if len(split) != 1 or type(placements[split[0]]) is not Shard:
        return None
    return Sharding(mesh, split[0], parameter.dtype, parameter.to_local().device)


def _gathered(matrix: Tensor, parameter: DTensor, function: Function) -> Tensor:
    """On every process alike."""
    mesh, whole = parameter.device_mesh, cast(DTensor, matrix).full_tensor()
    result = DTensor.from_local(function(whole), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return result.redistribute(placements=parameter.placements)


Entry = tuple[int, DTensor]  # number and parameter


@dataclass(frozen=True)
class OwnedMatrix:
    """A parameter of a bucket as it is sent: columns, where they are what is sharded, as rows."""

    number: int
    parameter: DTensor
    turned: bool

    def rows(self, size: int) -> list[int]:
        """Returns the rows of each process, as torch deals them out."""
        count = self.parameter.shape[1 if self.turned else 0]
        each = -(-count // size)
        return [max(0, min(each, count - each * rank)) for rank in range(size)]

    @property
    def width(self) -> int:
        return self.parameter.shape[0 if self.turned else 1]

    def turn(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.turned else tensor

    def flat(self, matrix: Tensor) -> Tensor:
        """This process's shard of its matrix, to be sent."""
        shard = cast(DTensor, matrix).redistribute(placements=self.parameter.placements).to_local()
        return self.turn(shard).reshape(-1)

    def sharded(self, flat: Tensor) -> DTensor:
        """The DTensor of which this process got that shard."""
        like = self.parameter
        shard = self.turn(flat.view(-1, self.width)).contiguous()
        return DTensor.from_local(
            shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def _buckets(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    """Runs of them, each of a multiple of `size`, so that every process can own as many."""
    bucket: list[Entry] = []
    nbytes = 0
    for number, parameter in entries:
        bucket.append((number, parameter))
        nbytes += parameter.numel() * parameter.element_size()
        if len(bucket) % size == 0 and nbytes >= BUCKET_BYTES * size:
            yield bucket
            bucket, nbytes = [], 0
    if bucket:
        yield bucket


def _assign_owners(bucket: Iterable[Entry], dimension: int, size: int) -> list[list[OwnedMatrix]]:
    """What each process owns: the largest first, to the one that has least to do."""
    load, owned = [0] * size, [list[OwnedMatrix]() for _ in range(size)]
    for number, parameter in sorted(bucket, key=lambda entry: -_work(entry[1])):
        owner = load.index(min(load))
        load[owner] += _work(parameter)
        turned = cast(Shard, parameter.placements[dimension]).dim % 2 == 1
        owned[owner].append(OwnedMatrix(number, parameter, turned))
    return owned


def _work(matrix: Tensor) -> int:
    return matrix.numel() * min(matrix.shape)


def _map_bucket(
    bucket: list[Entry], sharding: Sharding, make: Make, function: Function
) -> Iterator[tuple[int, Tensor]]:
    """Shards go to the owners, and shards of the results come back."""
    mesh, dimension = sharding.mesh, sharding.dimension
    group, size, rank = mesh.get_group(dimension), mesh.size(dimension), mesh.get_local_rank(dimension)
    owned = _assign_owners(bucket, dimension, size)
    dealt, mine = [entry for entries in owned for entry in entries], owned[rank]

    def count_of(entry: OwnedMatrix, of: int) -> int:
        return entry.rows(size)[of] * entry.width

    to_owners = [sum(count_of(entry, rank) for entry in entries) for entries in owned]
    from_all = [sum(count_of(entry, other) for entry in mine) for other in range(size)]
    sent = torch.cat([entry.flat(make(entry.number)) for entry in dealt])
    received = sent.new_empty(sum(from_all))
    dist.all_to_all_single(received, sent, from_all, to_owners, group=group)

    shards = iter(received.split([count_of(entry, other) for other in range(size) for entry in mine]))
    shards_by_rank = [[next(shards).view(-1, entry.width) for entry in mine] for _ in range(size)]
    results = []
    for entry, its in zip(mine, zip(*shards_by_rank, strict=True), strict=True):
        whole = entry.turn(torch.cat(its))
        results.append(entry.turn(function(whole)).split(entry.rows(size)))
    back = [result[other].reshape(-1) for other in range(size) for result in results]
    received, sent = sent, torch.cat([sent.new_empty(0), *back])
    dist.all_to_all_single(received, sent, to_owners, from_all, group=group)

    for entry, flat in zip(dealt, received.split([count_of(entry, rank) for entry in dealt]), strict=True):
        yield entry.number, entry.sharded(flat)
