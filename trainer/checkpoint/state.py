"""The canonical form of a run's state: names -> tensors, of which a process may hold all, a block or a flat stretch.

Every strategy describes what it holds in this form, so any strategy can load what another one saved, and each process
reads only what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.placement_types import _StridedShard

from trainer.errors import TrainingError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The data types that can be saved, by their names in the safetensors format."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FlatShard(NamedTuple):
    """Elements `start` to `start + len(values)` of a flattened tensor of `shape`: how DeepSpeed shards a parameter.
    `values` is 1-D, and filled in place when a checkpoint is loaded."""

    values: Tensor
    shape: torch.Size
    start: int


State = Mapping[str, "Tensor | FlatShard"]
Shape = tuple[int, ...]


ROOTS = ("model", "optimizer", "scaler")
"""The first parts of the paths of the run's own model; paths of another model have its name before them."""


def model_of(path: str) -> tuple[str, str]:
    """Returns the name of the model that a path of a state belongs to, empty for the run's own, and the path within
    it."""
    first, _, inner_path = path.partition("/")
    return ("", path) if first in ROOTS else (first, inner_path)


def is_weight(path: str) -> bool:
    """Returns whether a path of a state is a weight or buffer of a model."""
    return model_of(path)[1].startswith("model/")


class Box(NamedTuple):
    """A block of a tensor: the indices `offset[i]` to `offset[i] + size[i]` of each dimension i."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.size)

    def intersect(self, other: Box) -> Box | None:
        """Returns the block that two blocks of one tensor have in common, if any."""
        first = tuple(map(max, self.offset, other.offset))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        size = tuple(end - start for start, end in zip(first, ends, strict=True))
        return Box(first, size) if all(n > 0 for n in size) else None

    def narrow(self, outer: Box, tensor: Tensor) -> Tensor:
        """Returns the view of this block in `tensor`, which holds the block `outer`."""
        for dim, (start, first, size) in enumerate(zip(self.offset, outer.offset, self.size, strict=True)):
            tensor = tensor.narrow(dim, start - first, size)
        return tensor


def local_values(value: Tensor | FlatShard) -> Tensor:
    """Returns the elements that this rank holds."""
    return value.values if isinstance(value, FlatShard) else value


def shape_of(value: Tensor | FlatShard) -> tuple[int, ...]:
    """Returns the shape of the whole tensor."""
    return tuple(value.shape)


def dtype_of(value: Tensor | FlatShard) -> torch.dtype:
    return local_values(value).dtype


def shards_of(value: Tensor | FlatShard) -> list[tuple[Box, Tensor]]:
    """Returns the blocks that this process holds, as views of its memory; none where its shard is empty. Raises
    TrainingError for a tensor that is sharded in an unknown way."""
    if isinstance(value, FlatShard):
        start, shards = 0, []
        for box in flat_blocks(tuple(value.shape), value.start, value.start + len(value.values)):
            shards.append((box, value.values[start : start + box.numel].view(box.size)))
            start += box.numel
        return shards
    if isinstance(value, DTensor):
        local = value.to_local()
        coordinate = value.device_mesh.get_coordinate()
        if coordinate is None:
            return []
        box = _box(tuple(value.shape), value.device_mesh.shape, tuple(coordinate), value.placements)
        if tuple(local.shape) != box.size and (box.numel or local.numel()):
            raise TrainingError(
                f"a tensor of shape {tuple(value.shape)}, sharded as {value.placements}, cannot be saved: this process "
                f"holds a block of shape {tuple(local.shape)}, not {box.size}"
            )
    else:
        local, box = value, Box((0,) * value.dim(), tuple(value.shape))
    return [(box, local)] if box.numel else []


def sharded_dims(placements: Sequence[Placement]) -> tuple[tuple[int, int], ...]:
    """Returns pairs of a dimension of the mesh and the dimension of the tensor that is split along it, in the order of
    the splits. FSDP splits what tensor parallel has split already, though its mesh dimension comes first: torch calls
    that a strided shard."""
    splits = [
        (isinstance(placement, _StridedShard), axis, getattr(placement, "dim", None))
        for axis, placement in enumerate(placements)
    ]
    return tuple((axis, dim) for _, axis, dim in sorted(splits, key=lambda split: split[:2]) if dim is not None)


def chunk_bounds(length: Any, count: int, number: Any) -> tuple[Any, Any]:
    """Returns the first index and the size of chunk `number` of `count`, or of many: each as large as the first, as
    `torch.chunk` splits."""
    chunk = -(-length // count)
    start = np.minimum(number * chunk, length)
    return start, np.minimum(chunk, length - start)


@lru_cache(4096)
def _box(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> Box:
    """Returns the block of a DTensor at this coordinate of its mesh, by the rule of `shardings.MeshSharding`: torch's
    own answer is wrong for a strided shard of an uneven size. A state has thousands of tensors of a few kinds."""
    offset, size = [0] * len(shape), list(shape)
    for axis, dim in sharded_dims(placements):
        start, length = chunk_bounds(size[dim], mesh[axis], coordinate[axis])
        offset[dim], size[dim] = offset[dim] + int(start), int(length)
    return Box(tuple(offset), tuple(size))


def flat_blocks(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yields the elements from `start` to `stop` of a flattened tensor as blocks: in order, each of consecutive
    elements."""
    if start == stop:
        return
    if not shape:
        yield Box((), ())
        return
    row, row_shape = prod(shape[1:]), tuple(shape[1:])
    (first, a), (last, b) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _blocks_in_row(first, row_shape, a, b)
        return
    if a:
        yield from _blocks_in_row(first, row_shape, a, row)
        first += 1
    if last > first:
        yield Box((first, *(0 for _ in row_shape)), (last - first, *row_shape))
    yield from _blocks_in_row(last, row_shape, 0, b)


def _blocks_in_row(row: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    for box in flat_blocks(shape, start, stop):
        yield Box((row, *box.offset), (1, *box.size))
