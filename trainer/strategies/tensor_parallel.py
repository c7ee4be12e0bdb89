"""Tensor parallel: neighboring processes share the matrices of each layer (Shoeybi et al. 2019, "Megatron-LM",
section 3), optionally the sequences between them too (Korthikanti et al. 2022, section 4.2).

Every parameter becomes a DTensor on the mesh of these processes, also those that all of them keep whole, so that
fused optimizers have one kind of tensor to deal with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from trainer.errors import ConfigError
from trainer.models.tensor_parallel import Replicated
from trainer.objectives import Outputs
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.stages import OnOtherRank


class TensorParallel(StepArithmetic):
    """What strategies have in common whose layers may be split, and whose parameters may be in parts anywhere."""

    uses_loss_parallel = False
    loss_parallel = ExitStack()  # torch's, of the process: entered for the first model that shares its loss
    sharing = 0

    def split(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Splits the model over the mesh, and the loss, if it is to be shared."""
        if mesh.size() == 1:
            return
        split(model, mesh, self.config.sequence_parallel)  # type: ignore[attr-defined]
        if self.config.loss_parallel:  # type: ignore[attr-defined]
            self.uses_loss_parallel = True
            if not TensorParallel.sharing:
                TensorParallel.loss_parallel.enter_context(loss_parallel())
            TensorParallel.sharing += 1

    def outputs(self, outputs: Outputs) -> Outputs:
        return outputs if self.uses_loss_parallel else super().outputs(outputs)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return global_norm(gradients, self.topology.device)

    def close(self) -> None:
        if self.uses_loss_parallel:
            self.uses_loss_parallel = False
            TensorParallel.sharing -= 1
            if not TensorParallel.sharing:
                TensorParallel.loss_parallel.close()
        super().close()


def split(model: nn.Module, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Splits the model over the mesh as it says itself. Raises ConfigError if it does not."""
    if not hasattr(model, "tensor_parallel_plan"):
        raise ConfigError(
            f"strategy.tensor_parallel={mesh.size()}: the model {type(model).__name__} does not say how its "
            "matrices are split (trainer.models.TensorParallel); nearest: strategy.tensor_parallel=1"
        )
    # It advises a faster order of collectives for tensors that are gathered once, for a checkpoint.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    plan = model.tensor_parallel_plan(sequence_parallel)  # type: ignore[operator]
    here = [(name, module) for name, module in model.named_modules() if not isinstance(module, OnOtherRank)]
    for name, module in here:
        for style in [style for pattern, style in plan.items() if fnmatchcase(name, pattern)]:
            parallelize_module(module, mesh, style)
    for module in model.modules():
        if any(not isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            parallelize_module(module, mesh, Replicated())


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Sequence[Tensor], device: torch.device, copies: int = 1) -> Tensor:
    """The norm of the gradients of all processes, each counted once: `copies` processes hold each of these, besides
    those that a DTensor knows of. One sum, so that all processes get the same number to the last bit. Numbers of copies
    stay on the host: a tensor of them would have the host wait for the device."""
    squares = torch.zeros((), dtype=torch.float64, device=device)
    dtype = torch.promote_types(gradients[0].dtype, torch.float32) if gradients else torch.float32
    norms = torch._foreach_norm(list(map(local_tensor, gradients)), 2, dtype) if gradients else ()
    by_copies: dict[int, list[Tensor]] = {}
    for gradient, norm in zip(gradients, norms, strict=True):
        by_copies.setdefault(copies * _copies(gradient), []).append(norm)
    for held_by, those in by_copies.items():
        squares += torch.stack(those).double().square().sum().to(device) / held_by
    dist.all_reduce(squares)
    return squares.sqrt().to(dtype)


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same part of it."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(tensor.device_mesh.size(i) for i, layout in enumerate(tensor.placements) if layout.is_replicate())
