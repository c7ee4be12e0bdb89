"""Buffers: state of a model besides its parameters that a forward pass may change (running statistics, counters).

Persistent buffers are state like weights: they are the same on all replicas after every update, and no pass that does
not count (of an evaluation, a recomputation, `infer`) changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BufferSlot = tuple[nn.Module, str]  # looked up each time: a forward pass may assign another tensor


class Buffers:
    """The persistent buffers of a model. `group` is of the ranks that train replicas of it; None means all ranks, or
    this one alone."""

    def __init__(self, model: nn.Module, replicas: int, group: dist.ProcessGroup | None):
        self.slots = [slot for slot in buffer_slots(model) if slot[1] not in slot[0]._non_persistent_buffers_set]
        self.model, self.replicas, self.group = model, replicas, group
        self.saved_values: list[Tensor] = []

    def snapshot(self) -> None:
        """Saves the current values, which `end_update` and `put_back` may restore."""
        self.saved_values = [buffer.clone() for buffer in self._tensors()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores the values of the last `snapshot`."""
        for buffer, saved in zip(self._tensors(), self.saved_values, strict=True):
            buffer.copy_(saved)

    @torch.no_grad()
    def end_update(self, skipped: Tensor) -> None:
        """Ends an update. The model gets the sums of its `statistics` over all replicas. Each replica has changed its
        buffers by its own batches: floating-point buffers become the mean over the replicas, integer buffers the
        maximum. If `skipped` (a bool scalar, the same on all ranks), the values of the last `snapshot` are restored.

        Sums are fp64: the sum of equal values, divided by their number, is exactly that value: constants do not drift.
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
                reduced = self._all_reduce([buffers[number] for number in numbers], dtype)
                for number, mean in zip(numbers, reduced, strict=True):
                    means[number] = mean
        for buffer, mean, saved in zip(buffers, means, self.saved_values, strict=True):
            buffer.copy_(torch.where(skipped.to(buffer.device), saved, mean.to(buffer.dtype)))

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

    def _all_reduce(self, buffers: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Returns the mean of the buffers over all replicas, or the maximum of integers, by one collective."""
        if not buffers:
            return []
        flat = torch.cat([buffer.reshape(-1).to(dtype) for buffer in buffers])
        dist.all_reduce(flat, dist.ReduceOp.SUM if dtype.is_floating_point else dist.ReduceOp.MAX, group=self.group)
        flat = flat / self.replicas if dtype.is_floating_point else flat
        parts = flat.split([buffer.numel() for buffer in buffers])
        return [part.view(buffer.shape) for part, buffer in zip(parts, buffers, strict=True)]

    def _tensors(self) -> list[Tensor]:
        buffers = [module._buffers[name] for module, name in self.slots]
        tensors = [buffer.detach() for buffer in buffers if buffer is not None]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers of a model that are saved in checkpoints, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def buffer_slots(model: nn.Module) -> list[BufferSlot]:
    """Returns the module and name of each buffer of a model; a shared tensor is listed once."""
    slots: dict[int, BufferSlot] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                slots.setdefault(id(buffer), (module, name))
    return list(slots.values())


def clone_buffers(model: nn.Module) -> dict[int, Tensor]:
    """Returns copies of all buffers of a model, by the identity of the current tensors."""
    buffers = [module._buffers[name] for module, name in buffer_slots(model)]
    return {id(buffer): buffer.detach().clone() for buffer in buffers if buffer is not None}


@contextmanager
def preserve_buffers(model: nn.Module, replacements: dict[int, Tensor] | None = None) -> Iterator[None]:
    """Lets forward passes see and change copies of the buffers, or of `replacements` (from `clone_buffers`).

    Afterwards the model has its own tensors again, so no tensor that a graph may have saved is written to.
    """
    values = clone_buffers(model)
    values.update({key: value.clone() for key, value in (replacements or {}).items() if key in values})
    originals = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    for module, name, buffer in originals:
        module._buffers[name] = None if buffer is None else values[id(buffer)]
    try:
        yield
    finally:
        for module, name, buffer in originals:
            module._buffers[name] = buffer
