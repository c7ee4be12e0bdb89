"""Freezing: parameters that are not trained, by the names of modules or of their own."""

from __future__ import annotations

from torch import nn

from trainer.config import transforms as schema
from trainer.transforms import Transform, matching


class Freeze(Transform):
    Config = schema.Freeze
    config: schema.Freeze

    def apply(self, model: nn.Module) -> None:
        parts = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        parts += [name for name, _ in model.named_parameters(remove_duplicate=False)]
        frozen = matching(f"{self.key}.modules", self.config.modules, parts)
        kept = matching(f"{self.key}.but", self.config.but, parts)
        named = list(model.named_parameters(remove_duplicate=False))
        trained = {id(parameter) for name, parameter in named if _within(name, kept)}  # by any name of tied ones
        for name, parameter in named:
            if _within(name, frozen) and id(parameter) not in trained:
                parameter.requires_grad_(False)


def _within(name: str, parts: set[str]) -> bool:
    """Whether the parameter is one of these parts of the model, or in one."""
    steps = name.split(".")
    return any(".".join(steps[:count]) in parts for count in range(1, len(steps) + 1))
