"""Buffers: what a model keeps besides parameters, and a forward pass may change (running statistics, counters).

Those that are saved are state as weights are: the same on all replicas after every update, and changed by no pass that
does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BufferSlot = tuple[nn.Module, str]  # looked up each time: a forward pass may put another tensor there


class Buffers:
    """The persistent buffers of a model. `group`: the processes that train replicas of it; None where it is all of
    them, or this one alone."""

    def __init__(self, model: nn.Module, replicas: int, group: dist.ProcessGroup | None):
        self.slots = [slot for slot in buffer_slots(model) if slot[1] not in slot[0]._non_persistent_buffers_set]
        self.model, self.replicas, self.group = model, replicas, group
        self.before: list[Tensor] = []

    def snapshot(self) -> None:
        """Keeps the values of now, which `end_update` and `put_back` may go back to."""
        self.before = [buffer.clone() for buffer in self._tensors()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Undoes what forward passes did since `snapshot`."""
        for buffer, before in zip(self._tensors(), self.before, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def end_update(self, refused: Tensor) -> None:
        """Ends an update. The model hears the sums of its `statistics` over all replicas. Each replica has changed its
        buffers by its own batches: numbers become the mean of what all made of them, integers the largest. If `refused`
        (a bool scalar, the same on all processes) they are what they were.

        Sums are fp64: those of equal values, divided again, are these values, so constants stay what they are.
        """
        self._after_update()
        buffers = self._tensors()
        if self.replicas == 1:
            means = buffers
        else:
            means = list(buffers)
            floating = [number for number, buffer in enumerate(buffers) if buffer.is_floating_point()]
            whole = [number for number, buffer in enumerate(buffers) if not buffer.is_floating_point()]
            for numbers, dtype in ((floating, torch.float64), (whole, torch.int64)):
                settled = self._reduced([buffers[number] for number in numbers], dtype)
                for number, mean in zip(numbers, settled, strict=True):
                    means[number] = mean
        for buffer, mean, before in zip(buffers, means, self.before, strict=True):
            buffer.copy_(torch.where(refused.to(buffer.device), before, mean.to(buffer.dtype)))

    def _after_update(self) -> None:
        statistics = dict(self.model.named_buffers())
        names = [name for name in getattr(self.model, "statistics", ()) if name in statistics]
        if not names:
            return
        sums = {name: statistics[name].double() for name in names}  # copies
        if self.replicas > 1:
            flat = torch.cat([value.reshape(-1) for value in sums.values()])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([value.numel() for value in sums.values()])
            sums = {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
        for name in names:
            statistics[name].zero_()
        self.model.after_update(sums)  # type: ignore[operator]

    def _reduced(self, buffers: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The mean over all replicas, or of integers the maximum: one collective."""
        if not buffers:
            return []
        flat = torch.cat([buffer.reshape(-1).to(dtype) for buffer in buffers])
        dist.all_reduce(flat, dist.ReduceOp.SUM if dtype.is_floating_point else dist.ReduceOp.MAX, group=self.group)
        flat = flat / self.replicas if dtype.is_floating_point else flat
        parts = flat.split([buffer.numel() for buffer in buffers])
        return [part.view(buffer.shape) for part, buffer in zip(parts, buffers, strict=True)]

    def _tensors(self) -> list[Tensor]:
        found = [module._buffers[name] for module, name in self.slots]
        tensors = [buffer.detach() for buffer in found if buffer is not None]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers of a model that are saved, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def buffer_slots(model: nn.Module) -> list[BufferSlot]:
    """Where the buffers of a model are; each tensor once."""
    found: dict[int, BufferSlot] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found.setdefault(id(buffer), (module, name))
    return list(found.values())


def clone_buffers(model: nn.Module) -> dict[int, Tensor]:
    """Copies of all buffers of a model, by the identity of the tensors that are there now."""
    found = [module._buffers[name] for module, name in buffer_slots(model)]
    return {id(buffer): buffer.detach().clone() for buffer in found if buffer is not None}


@contextmanager
def preserve_buffers(model: nn.Module, instead: dict[int, Tensor] | None = None) -> Iterator[None]:
    """Forward passes within see and change copies of the buffers, or `instead` (of `clone_buffers`) these values.

    The model gets its own tensors back. So nothing is written that a graph may have saved.
    """
    values = clone_buffers(model)
    values.update({key: value.clone() for key, value in (instead or {}).items() if key in values})
    found = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    for module, name, buffer in found:
        module._buffers[name] = None if buffer is None else values[id(buffer)]
    try:
        yield
    finally:
        for module, name, buffer in found:
            module._buffers[name] = buffer
