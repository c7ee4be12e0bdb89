"""Applies a function of whole matrices to matrices that are sharded over ranks: each is sent to one rank, its owner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

BUCKET_BYTES = 64 * 2**20  # of the whole matrices that a rank owns at a time, if it owns more than one

Make = Callable[[int], Tensor]  # returns the matrix of a number, sharded as the parameter of that number is
Function = Callable[[Tensor], Tensor]  # of a whole matrix; its value has the same shape and type


class Sharding(NamedTuple):
    """How parameters are sharded: mesh dimension, data type and device."""

    mesh: DeviceMesh
    dimension: int
    dtype: torch.dtype
    device: torch.device


def map_whole_matrices(parameters: Sequence[Tensor], make: Make, function: Function) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of each parameter and `function` of the matrix that is made for it, sharded as the parameter
    is.

    Where one mesh dimension shards a parameter, only the owner has its whole matrix, and a bucket of them is made and
    sent at once. A parameter that several dimensions shard (FSDP with tensor parallel) is gathered on every rank. The
    owners follow from the shapes, so a resumed run has the same bits.
    """
    entries_by_sharding: dict[Sharding, list[Entry]] = {}
    for number, parameter in enumerate(parameters):
        if not isinstance(parameter, DTensor):
            yield number, function(make(number))
        elif (sharding := _sharding(parameter)) is not None:
            entries_by_sharding.setdefault(sharding, []).append((number, parameter))
        else:
            yield number, _map_gathered(make(number), parameter, function)
    for sharding, entries in entries_by_sharding.items():
        for bucket in _buckets(entries, sharding.mesh.size(sharding.dimension)):
            yield from _map_bucket(bucket, sharding, make, function)


def _sharding(parameter: DTensor) -> Sharding | None:
    """Returns how a parameter is sharded, if one mesh dimension shards it by rows or columns."""
    mesh, placements = parameter.device_mesh, parameter.placements
    split = [d for d in range(mesh.ndim) if mesh.size(d) > 1 and not placements[d].is_replicate()]
    if len(split) != 1 or type(placements[split[0]]) is not Shard:
        return None
    return Sharding(mesh, split[0], parameter.dtype, parameter.to_local().device)


def _map_gathered(matrix: Tensor, parameter: DTensor, function: Function) -> Tensor:
    """Computes `function` of the gathered matrix on every rank."""
    mesh, whole = parameter.device_mesh, cast(DTensor, matrix).full_tensor()
    result = DTensor.from_local(function(whole), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return result.redistribute(placements=parameter.placements)


Entry = tuple[int, DTensor]  # number and parameter


@dataclass(frozen=True)
class OwnedMatrix:
    """A parameter of a bucket as it is sent: transposed if its columns are sharded, so that shards are always rows."""

    number: int
    parameter: DTensor
    is_transposed: bool

    def rows(self, size: int) -> list[int]:
        """Returns how many rows each rank has, as torch shards them."""
        count = self.parameter.shape[1 if self.is_transposed else 0]
        chunk = -(-count // size)
        return [max(0, min(chunk, count - chunk * rank)) for rank in range(size)]

    @property
    def width(self) -> int:
        return self.parameter.shape[0 if self.is_transposed else 1]

    def orient(self, tensor: Tensor) -> Tensor:
        """Transposes a tensor if this parameter is sent transposed."""
        return tensor.T if self.is_transposed else tensor

    def to_flat(self, matrix: Tensor) -> Tensor:
        """Returns this rank's shard of the matrix, flattened to be sent."""
        shard = cast(DTensor, matrix).redistribute(placements=self.parameter.placements).to_local()
        return self.orient(shard).reshape(-1)

    def from_flat(self, flat: Tensor) -> DTensor:
        """Returns the DTensor whose shard this rank received, flattened."""
        parameter = self.parameter
        return DTensor.from_local(
            self.orient(flat.view(-1, self.width)).contiguous(),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def _buckets(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    """Yields runs of entries, each a multiple of `size` long, so that every rank can own as many."""
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
    """Returns what each rank owns: matrices are assigned largest first, to the rank with the least work."""
    load, owned = [0] * size, [list[OwnedMatrix]() for _ in range(size)]
    for number, parameter in sorted(bucket, key=lambda entry: -_work(entry[1])):
        owner = load.index(min(load))
        load[owner] += _work(parameter)
        is_transposed = cast(Shard, parameter.placements[dimension]).dim % 2 == 1
        owned[owner].append(OwnedMatrix(number, parameter, is_transposed))
    return owned


def _work(matrix: Tensor) -> int:
    return matrix.numel() * min(matrix.shape)


def _map_bucket(
    bucket: list[Entry], sharding: Sharding, make: Make, function: Function
) -> Iterator[tuple[int, Tensor]]:
    """Sends shards to the owners, which compute, and receives shards of the results."""
    mesh, dimension = sharding.mesh, sharding.dimension
    group, size, rank = mesh.get_group(dimension), mesh.size(dimension), mesh.get_local_rank(dimension)
    owned = _assign_owners(bucket, dimension, size)
    all_matrices, local_matrices = [matrix for matrices in owned for matrix in matrices], owned[rank]

    def count_of(matrix: OwnedMatrix, holder: int) -> int:
        return matrix.rows(size)[holder] * matrix.width

    to_owners = [sum(count_of(matrix, rank) for matrix in matrices) for matrices in owned]
    from_all = [sum(count_of(matrix, holder) for matrix in local_matrices) for holder in range(size)]
    input_buffer = torch.cat([matrix.to_flat(make(matrix.number)) for matrix in all_matrices])
    output_buffer = input_buffer.new_empty(sum(from_all))
    dist.all_to_all_single(output_buffer, input_buffer, from_all, to_owners, group=group)

    counts = [count_of(matrix, holder) for holder in range(size) for matrix in local_matrices]
    shards = iter(output_buffer.split(counts))
    shards_by_rank = [[next(shards).view(-1, matrix.width) for matrix in local_matrices] for _ in range(size)]
    results = []
    for matrix, rows in zip(local_matrices, zip(*shards_by_rank, strict=True), strict=True):
        whole = matrix.orient(torch.cat(rows))
        results.append(matrix.orient(function(whole)).split(matrix.rows(size)))
    flat_results = [result[holder].reshape(-1) for holder in range(size) for result in results]
    output_buffer, input_buffer = input_buffer, torch.cat([input_buffer.new_empty(0), *flat_results])
    dist.all_to_all_single(output_buffer, input_buffer, to_owners, from_all, group=group)

    flat_shards = output_buffer.split([count_of(matrix, rank) for matrix in all_matrices])
    for matrix, flat in zip(all_matrices, flat_shards, strict=True):
        yield matrix.number, matrix.from_flat(flat)
