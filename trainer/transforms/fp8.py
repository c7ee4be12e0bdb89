"""Linear layers that compute in fp8, by torchao: what `precision.compute=fp8` adds to a run's transforms."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from trainer.config import transforms as schema
from trainer.transforms import Transform


class FP8(Transform):
    """Converts the linear layers in `model.blocks` (or in the whole model, if it has no `blocks`) whose sizes are
    multiples of 16. Emulated layers multiply the rounded numbers in fp32.

    Each token is scaled by its own largest number, and gradients of weights are products in bf16
    ("rowwise_with_gw_hp"): so no number depends on its neighbors in the micro-batch. It is torchao's most exact recipe.
    """

    Config = schema.FP8
    config: schema.FP8

    def apply(self, model: nn.Module) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # late: most runs do not need it

        recipe = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
        config = replace(recipe, emulate=self.config.emulate)
        for layer in getattr(model, "blocks", [model]):
            convert_to_float8_training(layer, config=config, module_filter_fn=_fits)


def _fits(linear: nn.Linear, _name: str) -> bool:
    return all(size % 16 == 0 for size in (linear.in_features, linear.out_features))
