"""AdamW with 8-bit state by torchao (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization")."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torchao.optim
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(torchao.optim.AdamW8bit):
    """torchao's AdamW8bit, whose state can be saved as plain numbers, and whose rate is set like other optimizers'."""

    @staticmethod
    def _subclass_zeros(parameter: Tensor, signed: bool, block_size: int) -> Tensor:
        """Returns a state of zeros whose numbers stay the same when they are quantized again: a resumed run goes on
        exactly.

        That holds if the largest number of a block, by which all are divided, is represented exactly. torchao's
        numbers go from -0.993 to 1.
        """
        state = OptimState8bit.zeros(parameter.shape, signed, block_size, parameter.device)
        if signed:
            state.qmap[0] = -1.0
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        # torchao compiles the step. On CPUs that needs a C++ compiler, takes a while and gains little.
        on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            return super().step(closure)
