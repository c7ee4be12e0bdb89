"""The canonical form of a run's state: names -> tensors, of which a process may hold all, a block or a flat stretch.

Every strategy says what it holds in this form; so what one has saved any other can read, each process what it needs.
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
"""What can be saved, by the names that the safetensors format has."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FlatShard(NamedTuple):
    """Elements `start` to `start + len(values)` of a tensor of `shape`, flattened: how DeepSpeed deals out a parameter.
    `local_values` is 1-D, and filled in place when it is loaded."""

    values: Tensor
    shape: torch.Size
    start: int


State = Mapping[str, "Tensor | FlatShard"]
Shape = tuple[int, ...]


ROOTS = ("model", "optimizer", "scaler")
"""Where the state of the run's own model begins; that of another model has its name before them."""


def model_of(path: str) -> tuple[str, str]:
    """Returns the name of the model that a path of a state belongs to, empty for the run's own, and the rest of it."""
    first, _, rest = path.partition("/")
    return ("", path) if first in ROOTS else (first, rest)


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
        """What two blocks of one tensor have in common, if anything."""
        first = tuple(map(max, self.offset, other.offset))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        size = tuple(end - start for start, end in zip(first, ends, strict=True))
        return Box(first, size) if all(n > 0 for n in size) else None

    def within(self, outer: Box, tensor: Tensor) -> Tensor:
        """The view of this block in `tensor`, which holds the block `outer`."""
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
    """The blocks that this process holds, as views of its memory; none where its share is empty. Raises TrainingError
    for a tensor that is sharded in a way of its own."""
    if isinstance(value, FlatShard):
        start, found = 0, []
        for box in flat_blocks(tuple(value.shape), value.start, value.start + len(value.values)):
            found.append((box, value.values[start : start + box.numel].view(box.size)))
            start += box.numel
        return found
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
    """Pairs of a dimension of the mesh and the one of the tensor that is cut along it, in the order of the cuts. FSDP
    cuts what tensor parallel has cut already, though its dimension of the mesh comes first: torch calls that a strided
    shard."""
    cuts = [(isinstance(it, _StridedShard), axis, getattr(it, "dim", None)) for axis, it in enumerate(placements)]
    return tuple((axis, dim) for _, axis, dim in sorted(cuts, key=lambda cut: cut[:2]) if dim is not None)


def chunk_bounds(length: Any, count: int, number: Any) -> tuple[Any, Any]:
    """The first index and the size of a piece, or of many, of `count`: each as large as the first, as `torch.chunk`
    cuts."""
    chunk = -(-length // count)
    start = np.minimum(number * chunk, length)
    return start, np.minimum(chunk, length - start)


@lru_cache(4096)
def _box(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> Box:
    """What of a DTensor lies at this place of its mesh, by the rule of `shardings.Grid`: torch's own answer is wrong
    for a strided shard of a size that does not divide. A state has thousands of tensors of a few kinds."""
    offset, size = [0] * len(shape), list(shape)
    for axis, dim in sharded_dims(placements):
        start, length = chunk_bounds(size[dim], mesh[axis], coordinate[axis])
        offset[dim], size[dim] = offset[dim] + int(start), int(length)
    return Box(tuple(offset), tuple(size))


def flat_blocks(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements from `start` to `stop` of a flattened tensor as blocks: in order, each of consecutive elements."""
    if start == stop:
        return
    if not shape:
        yield Box((), ())
        return
    row, rest = prod(shape[1:]), tuple(shape[1:])
    (first, a), (last, b) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, rest, a, b)
        return
    if a:
        yield from _in_row(first, rest, a, row)
        first += 1
    if last > first:
        yield Box((first, *(0 for _ in rest)), (last - first, *rest))
    yield from _in_row(last, rest, 0, b)


def _in_row(row: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    for box in flat_blocks(shape, start, stop):
        yield Box((row, *box.offset), (1, *box.size))
