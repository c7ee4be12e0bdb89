"""Which parameters have a gradient in a step. One that has none on any process is not updated and does not decay.

torch says it by `grad is None`, which is lost where gradients are sent, sharded or flattened together.
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
    """Notes what gets a gradient on this process. `names`: of all parameters that are trained, the same on every
    process; `model` may be only a part of it."""

    def __init__(self, names: Sequence[str], model: nn.Module, device: torch.device):
        self.names, self.model, self.device = names, model, device
        self.with_gradient: set[str] = set()

    def watch(self) -> None:
        """Watches the parameters by hooks on them."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._note, name))

    def watch_groups(self, sharded: nn.Module) -> None:
        """By FSDP2, whose parameters are other tensors in a backward pass than those of the model. `sharded`: what was
        given to it."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        note_gradients(sharded, lambda parameter: self.with_gradient.add(names[id(parameter)]))

    def find_unused(self) -> set[str]:
        """Returns the parameters that had no gradient on any rank since the last call. A collective; the host waits for
        it."""
        flags_anywhere = all_reduce_any([name in self.with_gradient for name in self.names], self.device).tolist()
        self.with_gradient.clear()
        return {name for name, used in zip(self.names, flags_anywhere, strict=True) if not used}

    def _note(self, name: str, _parameter: Tensor) -> None:
        self.with_gradient.add(name)


def all_reduce_any(flags: Sequence[bool], device: torch.device) -> Tensor:
    """Each flag as any process has it, as int32 on the device."""
    flags_anywhere = _on_device(tuple(flags), device).clone()
    if dist.is_initialized():
        dist.all_reduce(flags_anywhere, dist.ReduceOp.MAX)
    return flags_anywhere


@functools.lru_cache(maxsize=8)
def _on_device(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """Kept, because the host waits for the device's queue where it sends a list there."""
    return torch.tensor(flags, dtype=torch.int32, device=device)
