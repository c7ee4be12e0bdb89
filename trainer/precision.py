"""The three data types of a run (weights, products, sums over ranks), and the loss scaling that fp16 needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import schema
from trainer.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The data types of a run. `compute` is the type of matrix products and attention, by torch's autocast, the same
    under every strategy."""

    device: torch.device
    compute: str = "fp32"
    param: str = "fp32"
    reduce: str = "fp32"

    @classmethod
    def resolve(cls, config: schema.Precision, device: torch.device) -> Precision:
        """Resolves `auto` to bf16 where the hardware is fast at it (GPUs since Ampere), to fp32 elsewhere.

        Raises ConfigError where the hardware does not support the config.
        """
        compute, capability = config.compute, (0, 0)
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
        if compute == "auto":
            compute = "bf16" if capability >= (8, 0) or config.param == "bf16" else "fp32"
        if compute == "fp8" and capability < (8, 9):
            where = f"this GPU has compute capability {capability[0]}.{capability[1]}" if any(capability) else "no GPU"
            raise ConfigError(
                f"precision.compute=fp8: needs a GPU with fp8 units (compute capability 8.9 or higher: H100, L40, "
                f"RTX 40 or newer), here: {where}; nearest: precision=bf16"
            )
        return cls(device, compute, config.param, config.reduce)

    @property
    def reduce_dtype(self) -> torch.dtype:
        return DTYPES[self.reduce]

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES["bf16" if self.compute == "fp8" else self.compute]

    def autocast(self, cache: bool = True) -> AbstractContextManager[object]:
        """Returns the autocast context. `cache`: a weight is cast once, and its copy kept to the end of the context."""
        if self.compute == self.param == "fp32":
            return nullcontext()
        enabled = self.compute != self.param
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=enabled, cache_enabled=cache)

    def scaler(self) -> LossScaler:
        return LossScaler(enabled=self.compute == "fp16")


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed precision training", section 3.2): the loss is multiplied
    so that small gradients do not vanish in fp16; a step whose gradients overflow is skipped, and the scale halved.

    torch's GradScaler decides by the gradients that a rank holds. This one decides by the global norm, which is the
    same on every rank: all skip a step or none does, also where ranks hold different parameters. It does nothing if
    not enabled.
    """

    GROWTH_INTERVAL = 2000  # steps without overflow, after which the scale is doubled

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.scale, self.growth_tracker = (2.0**16 if enabled else 1.0), 0

    @torch.no_grad()
    def unscale(self, gradients: list[Tensor]) -> None:
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def accepts(self, norm: Tensor, targets: Tensor) -> bool:
        """Returns whether the step with this gradient norm may be done; adapts the scale, unless the step was abandoned
        (its number of targets is NaN). Waits for the device, if enabled."""
        if not self.enabled or bool(targets.isnan()):
            return True
        is_finite = bool(norm.isfinite())
        self.growth_tracker = self.growth_tracker + 1 if is_finite else 0
        if not is_finite:
            self.scale /= 2
        elif self.growth_tracker == self.GROWTH_INTERVAL:
            self.scale, self.growth_tracker = self.scale * 2, 0
        return is_finite

    def state(self) -> dict[str, Tensor]:
        """Returns the state by its names in a checkpoint; empty if not enabled."""
        if not self.enabled:
            return {}
        return {
            "scaler/scale": torch.tensor(self.scale, dtype=torch.float64),
            "scaler/growth_tracker": torch.tensor(self.growth_tracker, dtype=torch.int64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.enabled:
            self.scale = float(state["scaler/scale"])
            self.growth_tracker = int(state["scaler/growth_tracker"])
