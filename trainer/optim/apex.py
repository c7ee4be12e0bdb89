"""AdamW by NVIDIA Apex's FusedAdam, with the state of torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from apex.optimizers import FusedAdam  # type: ignore[import-not-found]


class ApexAdamW(FusedAdam):  # type: ignore[misc]
    """FusedAdam with step counts in the state of each parameter, as torch has them; Apex counts by parameter group."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    group["step"] = int(state["step"])
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if state := self.state.get(parameter):
                    state["step"] = torch.tensor(float(group["step"]))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        torch.optim.Optimizer.zero_grad(self, set_to_none)
