"""LoRA (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models"): the model is frozen, and to its matrices
W products of two small ones are added, W + alpha / rank * B A, which are trained. B is zero at first.

Both are parameters of the linear layer itself, so `weight` keeps its name for sharding, `model.weights` and export.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import transforms as schema
from trainer.errors import ConfigError
from trainer.transforms import Read, Transform, matching

A, B = "lora_a", "lora_b"
TRANSPOSED = "Conv1D"  # a linear layer of transformers' GPT-2, whose weight is [in, out]


class LoRA(Transform):
    Config = schema.LoRA
    config: schema.LoRA

    def __init__(self, config: schema.LoRA):
        super().__init__(config)
        self.scale = (config.alpha or config.rank) / config.rank
        self.transposed: dict[str, bool] = {}  # by the name of each layer that is adapted

    def apply(self, model: nn.Module) -> None:
        linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
        if not linear:
            raise ConfigError("model.transforms.lora: the model has no linear layers")
        adapted = matching("model.transforms.lora.modules", self.config.modules, linear)
        model.requires_grad_(False)
        for name in sorted(adapted):
            self.transposed[name] = type(linear[name]).__name__ == TRANSPOSED
            self._adapt(name, linear[name], self.transposed[name])

    def _adapt(self, name: str, layer: nn.Module, transposed: bool) -> None:
        if isinstance(layer, _Adapted):
            raise ConfigError(f"model.transforms.lora: {name} is adapted already; one lora a model")
        weight: Any = layer.weight
        outputs, inputs = reversed(weight.shape) if transposed else weight.shape
        for leaf, shape in ((A, (self.config.rank, inputs)), (B, (outputs, self.config.rank))):
            layer.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device)))
        layer.__class__ = _adapted(type(layer))  # type: ignore[arg-type]
        layer.lora_scale = self.scale  # type: ignore[assignment]

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """A as `nn.Linear` draws a matrix."""
        leaf = name.rpartition(".")[2]
        if leaf == A:
            bound = 1 / math.sqrt(value.shape[1])
            value.uniform_(-bound, bound, generator=generator)
        elif leaf == B:
            value.zero_()
        return leaf in (A, B)

    def merged(self, name: str, value: Tensor, read: Read) -> Tensor | None:
        layer, _, leaf = name.rpartition(".")
        if leaf in (A, B):
            return None
        if leaf != "weight" or layer not in self.transposed:
            return value
        a, b = read(f"{layer}.{A}").double(), read(f"{layer}.{B}").double()
        added = self.scale * (b @ a)
        return (value.double() + (added.T if self.transposed[layer] else added)).to(value.dtype)


class _Adapted(nn.Module):
    lora_a: Tensor
    lora_b: Tensor
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)  # type: ignore[misc]


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of an adapted layer that was of this class: the same one for every model."""
    return type(f"LoRA{kind.__name__}", (_Adapted, kind), {})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == TRANSPOSED
