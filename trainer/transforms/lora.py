"""LoRA (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models"): the model is frozen, and to each
matrix W a trained product of two small ones is added, W + alpha / rank * B A. B is zero at first.

A and B are parameters of the linear layer itself, so `weight` keeps its name for sharding, `model.weights` and export.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import transforms as schema
from trainer.errors import ConfigError
from trainer.transforms import NEAREST, Read, Transform, match_names

A, B = "lora_a", "lora_b"
NEVER_CALLED = {nn.MultiheadAttention: ("out_proj",), nn.TransformerEncoderLayer: ("linear1", "linear2")}
TRANSPOSED = "Conv1D"  # a linear layer of transformers' GPT-2, whose weight is [in, out]


class LoRA(Transform):
    Config = schema.LoRA
    config: schema.LoRA

    def __init__(self, config: schema.LoRA):
        super().__init__(config)
        self.scale = (config.alpha or config.rank) / config.rank
        self.transposed: dict[str, bool] = {}  # whether the weight is transposed, by the name of each adapted layer
        self.tied: dict[str, str] = {}  # adapted layer -> a layer with the same weight and no adapters

    def apply(self, model: nn.Module) -> None:
        """Adds adapters to the matched layers. If an earlier transform has frozen parameters, the others stay trained;
        otherwise the whole model is frozen."""
        parts = list(model.named_modules(remove_duplicate=False))
        linear = {name: module for name, module in parts if _is_linear(module)}
        if not linear:
            raise ConfigError(f"{self.key}: the model has no linear layers")
        if adapted := next((module for _, module in parts if isinstance(module, _Adapted)), None):
            raise ConfigError(
                f"{self.key}: {adapted.lora_key} is a lora already, and a model has one; name all layers there"
            )
        names = sorted(match_names(f"{self.key}.modules", self.config.modules, linear))
        if not getattr(model, "frozen_by_transforms", None):
            model.requires_grad_(False)
        self._raise_if_unusable(names, linear, _find_never_called(parts))
        layers = {linear[name]: name for name in reversed(names)}
        for name, module in linear.items():
            if module in layers:  # under all of its names
                self.transposed[name] = type(module).__name__ == TRANSPOSED
        weights = {layer.weight: layer for layer in layers}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            layer = weights.get(parameter)  # type: ignore[call-overload]
            if layer is not None and linear.get(name.removesuffix(".weight")) is not layer:
                self.tied |= {adapted_name: name for adapted_name in self.transposed if linear[adapted_name] is layer}
        for layer, name in layers.items():
            self._adapt(layer, self.transposed[name])

    def _raise_if_unusable(self, names: Iterable[str], linear: dict[str, nn.Module], never_called: set[str]) -> None:
        """Raises ConfigError for layers whose adapters would not be used, or whose weights would be trained as well."""
        problems = []
        if unused := [name for name in names if name in never_called]:
            problems.append(
                f"{self.key}.modules: {_list_some(unused)} cannot be adapted: torch computes with their weights "
                "without calling them (nn.MultiheadAttention, nn.TransformerEncoderLayer); name other layers"
            )
        if trained := [name for name in names if linear[name].weight.requires_grad]:  # type: ignore[union-attr]
            problems.append(
                f"{self.key}.modules: {_list_some(trained)} would be adapted, but an earlier transform leaves them "
                "trained themselves; freeze them, too (freeze.modules=['*'], and in freeze.but what is trained), or "
                "name others"
            )
        if problems:
            raise ConfigError(problems)

    def _adapt(self, layer: nn.Module, transposed: bool) -> None:
        weight: Any = layer.weight
        outputs, inputs = reversed(weight.shape) if transposed else weight.shape
        for leaf, shape in ((A, (self.config.rank, inputs)), (B, (outputs, self.config.rank))):
            layer.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device)))
        layer.__class__ = _adapted_class(type(layer))  # type: ignore[arg-type]
        layer.lora_scale, layer.lora_key = self.scale, self.key  # type: ignore[assignment]

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """Fills A like a matrix of `nn.Linear`, and B with zeros."""
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
        if layer in self.tied:
            raise ConfigError(
                f"{self.key}: {name} is also the weight of {self.tied[layer]}, which has no adapters: no plain "
                "model computes the same, so this run cannot be exported; name the other layers in lora.modules"
            )
        a, b = read(f"{layer}.{A}").double(), read(f"{layer}.{B}").double()
        added = self.scale * (b @ a)
        return (value.double() + (added.T if self.transposed[layer] else added)).to(value.dtype)


class _Adapted(nn.Module):
    lora_a: Tensor
    lora_b: Tensor
    lora_scale: float
    lora_key: str  # config key of the section that has adapted it

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)  # type: ignore[misc]


@cache
def _adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of an adapted layer of this class; it is the same one for every model."""
    return type(f"LoRA{kind.__name__}", (_Adapted, kind), {})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == TRANSPOSED


def _find_never_called(parts: Iterable[tuple[str, nn.Module]]) -> set[str]:
    """Returns the names of layers whose forward pass torch does not call: in attention always, in encoder layers during
    evaluation."""
    return {
        f"{name}.{layer}".removeprefix(".")
        for name, module in parts
        for kind, layers in NEVER_CALLED.items()
        if isinstance(module, kind)
        for layer in layers
    }


def _list_some(names: Sequence[str]) -> str:
    more = len(names) - NEAREST
    return ", ".join(names[:NEAREST]) + (f" and {more} more" if more > 0 else "")
