"""A transform of a user's: a learned scale behind each norm, which a plain model has in the norm's own weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import onecurve


class Scaled(nn.LayerNorm):
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Scales(onecurve.Transform):
    class Config(onecurve.Plugin):
        start: float

    def apply(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        for module in model.modules():
            if type(module) is nn.LayerNorm:
                module.__class__ = Scaled
                module.register_parameter("scale", nn.Parameter(torch.empty_like(module.weight)))

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> bool:
        if name.endswith(".scale"):
            value.fill_(self.config.start)
        return name.endswith(".scale")

    def merged(self, name: str, value: Tensor, read: Callable[[str], Tensor]) -> Tensor | None:
        if name.endswith(".scale"):
            return None
        return value * read(name.replace(".weight", ".scale")) if "norm" in name else value


class Weighted(torch.nn.Linear):
    """A model with a key `weights` of its own, which says nothing of files."""

    class Config(onecurve.Plugin):
        weights: str


class Looks(torch.nn.Linear):
    """A model that is as wide as the data."""

    class Config(onecurve.Plugin):
        pass

    def __init__(self, config: Config, facts: onecurve.Facts):
        super().__init__(facts.example["inputs"].shape[1], 1)
