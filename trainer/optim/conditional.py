"""A step of an optimizer that is done or not, as a number on the device says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from trainer.patches import has_step_hooks


def step_unless(optimizer: torch.optim.Optimizer, refused: Tensor) -> None:
    """Steps unless `refused` (a bool scalar).

    Optimizers whose kernels can leave their work undone (torch's fused ones, as for its GradScaler) decide on the
    device; for the others this waits to know.
    """
    fused: Any = optimizer
    example = next((parameter for group in optimizer.param_groups for parameter in group["params"]), None)
    if example is None:  # a stage of a pipeline that is frozen
        return
    hooks = has_step_hooks(optimizer)  # an average of weights would count a step that was not done
    if hooks or not optimizer.defaults.get("fused") or example.device.type != refused.device.type:
        if not bool(refused):
            optimizer.step()
        return
    found = refused.float()
    if isinstance(example, DTensor):
        mesh = example.device_mesh
        found = DTensor.from_local(found, mesh, [Replicate()] * mesh.ndim, run_check=False)
    fused.grad_scale, fused.found_inf = None, found
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf
