"""Freezes parameters by the names of modules or of the parameters themselves."""

from __future__ import annotations

from torch import nn

from trainer.config import transforms as schema
from trainer.transforms import Transform, match_names


class Freeze(Transform):
    Config = schema.Freeze
    config: schema.Freeze

    def apply(self, model: nn.Module) -> None:
        parts = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        parts += [name for name, _ in model.named_parameters(remove_duplicate=False)]
        frozen = match_names(f"{self.key}.modules", self.config.modules, parts)
        exceptions = match_names(f"{self.key}.but", self.config.but, parts)
        parameters = list(model.named_parameters(remove_duplicate=False))
        # A tied parameter counts under any of its names.
        trained = {id(parameter) for name, parameter in parameters if _is_within(name, exceptions)}
        for name, parameter in parameters:
            if _is_within(name, frozen) and id(parameter) not in trained:
                parameter.requires_grad_(False)


def _is_within(name: str, parts: set[str]) -> bool:
    """Returns whether the parameter is one of these parts of the model, or in one."""
    steps = name.split(".")
    return any(".".join(steps[:count]) in parts for count in range(1, len(steps) + 1))
