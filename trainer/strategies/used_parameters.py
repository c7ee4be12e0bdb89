"""Records which parameters have a gradient in a step. One that has none on any rank is not updated or decayed.

torch marks it by `grad is None`, which is lost where gradients are sent, sharded or flattened together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.patches import note_gradients


class UsedParameters:
    """Records which parameters get a gradient on this rank. `names` are those of all trained parameters, the same on
    every rank; `model` may be only a part of the whole."""

    def __init__(self, names: Sequence[str], model: nn.Module, device: torch.device):
        self.names, self.model, self.device = names, model, device
        self.used_names: set[str] = set()

    def watch(self) -> None:
        """Records gradients by hooks on the parameters."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._record, name))

    def watch_groups(self, sharded: nn.Module) -> None:
        """Records gradients by FSDP2, in whose backward pass parameters are other tensors than the model's. `sharded`
        is a module that `fully_shard` was applied to."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        note_gradients(sharded, lambda parameter: self.used_names.add(names[id(parameter)]))

    def find_unused(self) -> set[str]:
        """Returns the names of parameters that had no gradient on any rank since the last call. This is a collective,
        which the host waits for."""
        flags_anywhere = all_reduce_any([name in self.used_names for name in self.names], self.device).tolist()
        self.used_names.clear()
        return {name for name, used in zip(self.names, flags_anywhere, strict=True) if not used}

    def _record(self, name: str, _parameter: Tensor) -> None:
        self.used_names.add(name)


def all_reduce_any(flags: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> Tensor:
    """Returns for each flag whether any rank of the group (None: of all) has set it, as int32 on the device."""
    flags_anywhere = _on_device(tuple(flags), device).clone()
    if dist.is_initialized():
        dist.all_reduce(flags_anywhere, dist.ReduceOp.MAX, group=group)
    return flags_anywhere


@functools.lru_cache(maxsize=8)
def _on_device(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """Returns the flags as a tensor; it is cached, because sending a list to the device waits for its queue."""
    return torch.tensor(flags, dtype=torch.int32, device=device)
