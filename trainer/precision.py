"""Which data type computes, and the loss scaling that fp16 needs. Weights, gradients and reductions stay fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """`compute` is the dtype of matrix products and attention."""

    name: str
    device: torch.device

    @classmethod
    def resolve(cls, name: str, device: torch.device) -> Precision:
        """`auto` is bf16 where the hardware is fast at it (GPUs since Ampere), fp32 elsewhere."""
        if name == "auto":
            name = "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
        return cls(name, device)

    @property
    def compute(self) -> torch.dtype:
        return _DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    def scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling for fp16; does nothing for the other types."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")
