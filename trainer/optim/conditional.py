"""An optimizer step that is skipped if a number on the device says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from trainer.patches import has_step_hooks


def step_unless(optimizer: torch.optim.Optimizer, is_refused: Tensor) -> None:
    """Steps the optimizer unless `is_refused` (a bool scalar).

    Optimizers whose kernels can skip their work (torch's fused ones, as for its GradScaler) decide on the device; for
    the others this waits for the value.
    """
    fused: Any = optimizer
    example = next((parameter for group in optimizer.param_groups for parameter in group["params"]), None)
    if example is None:  # a stage of a pipeline that is frozen
        return
    hooks = has_step_hooks(optimizer)  # an average of weights would count a step that was not done
    if hooks or not optimizer.defaults.get("fused") or example.device.type != is_refused.device.type:
        if not bool(is_refused):
            optimizer.step()
        return
    found_inf = is_refused.float()
    if isinstance(example, DTensor):
        mesh = example.device_mesh
        found_inf = DTensor.from_local(found_inf, mesh, [Replicate()] * mesh.ndim, run_check=False)
    fused.grad_scale, fused.found_inf = None, found_inf
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf
