"""Tensor parallel: neighboring ranks share the matrices of each layer (Shoeybi et al. 2019, "Megatron-LM", section 3)
and optionally the sequences between layers (sequence parallel: Korthikanti et al. 2022, section 4.2).

Every parameter becomes a DTensor on the mesh of these ranks, even if each of them keeps it whole, so that fused
optimizers get only one kind of tensor.
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
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from trainer.errors import ConfigError
from trainer.models.tensor_parallel import Replicated
from trainer.objectives import Outputs
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.buckets import all_reduce_buckets
from trainer.strategies.stages import OnOtherRank


class TensorParallel(StepArithmetic):
    """The base class of strategies that may split layers and shard parameters."""

    uses_loss_parallel = False
    loss_parallel = ExitStack()  # torch's context, one per process: entered for the first model with loss parallel
    num_loss_parallel = 0  # models

    def split(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Splits the model over the mesh, and the loss, too, under `loss_parallel`."""
        if mesh.size() == 1:
            return
        split(model, mesh, self.config.sequence_parallel)  # type: ignore[attr-defined]
        if self.config.loss_parallel:  # type: ignore[attr-defined]
            self.uses_loss_parallel = True
            if not TensorParallel.num_loss_parallel:
                TensorParallel.loss_parallel.enter_context(loss_parallel())
            TensorParallel.num_loss_parallel += 1

    def outputs(self, outputs: Outputs) -> Outputs:
        return outputs if self.uses_loss_parallel else super().outputs(outputs)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return global_norm(gradients, self.topology.device)

    def close(self) -> None:
        if self.uses_loss_parallel:
            self.uses_loss_parallel = False
            TensorParallel.num_loss_parallel -= 1
            if not TensorParallel.num_loss_parallel:
                TensorParallel.loss_parallel.close()
        super().close()


def split(model: nn.Module, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Splits the model over the mesh by its `tensor_parallel_plan`. Raises ConfigError if it has none."""
    if not hasattr(model, "tensor_parallel_plan"):
        raise ConfigError(
            f"strategy.tensor_parallel={mesh.size()}: the model {type(model).__name__} does not say how its "
            "matrices are split (trainer.models.TensorParallel); nearest: strategy.tensor_parallel=1"
        )
    # torch advises a faster order of collectives for tensors that are only gathered for a checkpoint.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    plan = model.tensor_parallel_plan(sequence_parallel)  # type: ignore[operator]
    local_modules = [(name, module) for name, module in model.named_modules() if not isinstance(module, OnOtherRank)]
    for name, module in local_modules:
        for style in [style for pattern, style in plan.items() if fnmatchcase(name, pattern)]:
            parallelize_module(module, mesh, style)
    for module in model.modules():
        if any(not isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            parallelize_module(module, mesh, Replicated())


def all_reduce_partial_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sums the gradients of parameters that all ranks of a layer keep whole (norms, under sequence parallel), in few
    buckets: DTensor would send each gradient alone."""
    partial = [parameter for parameter in model.parameters() if _is_partial(parameter, mesh)]
    gradients = [local_tensor(parameter.grad) for parameter in partial]  # type: ignore[arg-type]
    if gradients:
        all_reduce_buckets(gradients, mesh.get_group())
    for parameter, gradient in zip(partial, gradients, strict=True):
        parameter.grad = DTensor.from_local(gradient, mesh, parameter.placements, run_check=False)  # type: ignore[attr-defined]


def _is_partial(parameter: nn.Parameter, mesh: DeviceMesh) -> bool:
    """Returns whether the gradient is a partial sum over the mesh while the parameter is whole on each of its ranks."""
    gradient = parameter.grad
    if not (isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.device_mesh == mesh):
        return False
    return tuple(gradient.placements) == (Partial("sum"),) and tuple(parameter.placements) == (Replicate(),)


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Sequence[Tensor], device: torch.device, replicas: int = 1) -> Tensor:
    """Returns the norm of the gradients of all ranks, each counted once: `replicas` ranks hold each of these, besides
    the replicas that a DTensor knows of. It is one sum, so that all ranks get the same number to the last bit. Numbers
    of replicas stay on the host: for a tensor of them it would wait for the device."""
    squares = torch.zeros((), dtype=torch.float64, device=device)
    dtype = torch.promote_types(gradients[0].dtype, torch.float32) if gradients else torch.float32
    norms = torch._foreach_norm(list(map(local_tensor, gradients)), 2, dtype) if gradients else ()
    norms_by_replicas: dict[int, list[Tensor]] = {}
    for gradient, norm in zip(gradients, norms, strict=True):
        norms_by_replicas.setdefault(replicas * _count_replicas(gradient), []).append(norm)
    for num_replicas, replicated_norms in norms_by_replicas.items():
        squares += torch.stack(replicated_norms).double().square().sum().to(device) / num_replicas
    dist.all_reduce(squares)
    return squares.sqrt().to(dtype)


def _count_replicas(tensor: Tensor) -> int:
    """Returns how many ranks hold the same shard of it, as far as a DTensor knows."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(tensor.device_mesh.size(i) for i, layout in enumerate(tensor.placements) if layout.is_replicate())
