"""All-reduces gradients in few large buckets, several of which are under way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T", bound=Tensor)
BUCKET_BYTES = 25 * 2**20  # as in torch's DDP: this keeps links busy, and two buckets fit next to any model
IN_FLIGHT = 2  # buckets; more would only cost memory


@torch.no_grad()
def all_reduce_buckets(gradients: Sequence[Tensor], group: dist.ProcessGroup, dtype: torch.dtype | None = None) -> None:
    """Replaces each gradient by its sum over the group, computed in `dtype`, or in the gradients' own data type.

    Every rank of the group passes gradients of the same shapes in the same order. Only these and `BUCKET_BYTES` decide
    the order of the sums, so a resumed run adds up exactly as an uninterrupted one.
    """
    in_flight: deque[tuple[list[Tensor], Tensor, dist.Work]] = deque()
    for bucket in split_into_buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        flat = flat if dtype is None else flat.to(dtype)
        work = dist.all_reduce(flat, group=group, async_op=True)
        assert work is not None
        in_flight.append((bucket, flat, work))
        if len(in_flight) == IN_FLIGHT:
            _wait_and_copy(*in_flight.popleft())
    while in_flight:
        _wait_and_copy(*in_flight.popleft())


def _wait_and_copy(bucket: list[Tensor], flat: Tensor, work: dist.Work) -> None:
    work.wait()
    parts = flat.split([gradient.numel() for gradient in bucket])
    torch._foreach_copy_(bucket, [part.view(gradient.shape) for part, gradient in zip(parts, bucket, strict=True)])


def split_into_buckets(gradients: Sequence[T]) -> Iterator[list[T]]:
    """Yields runs of gradients of one data type, each of about `BUCKET_BYTES`."""
    bucket: list[T] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
