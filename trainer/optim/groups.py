"""Which parameters are treated alike: by what they are, found from their module and their own name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "InstanceNorm")
_TABLES = ("embed", "token", "position")  # in the name of a parameter that is looked up in, not multiplied by


def kind(model: nn.Module, name: str) -> str:
    """Returns `bias`, `norm`, `embedding`, `vector` or `matrix`: what the parameter `name` is, by its module, its own
    name and its shape.

    A vector is what scales or gates: of one dimension or none (LayerScale, a temperature), or of more that are all 1
    but one (a class token).
    """
    path, _, leaf = name.rpartition(".")
    module, shape = model.get_submodule(path), shape_of(model.get_parameter(name))
    if "bias" in leaf:  # also in_proj_bias, relative_position_bias_table
        return "bias"
    if any(norm in type(module).__name__ for norm in _NORMS):  # also FusedLayerNorm, LlamaRMSNorm
        return "norm"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if len(shape) < 2 or (leaf != "weight" and len(shape) > 2 and sum(size > 1 for size in shape) < 2):
        return "vector"
    return "embedding" if any(table in leaf for table in _TABLES) else "matrix"


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Returns the whole shape, also where DeepSpeed holds a part of the parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def by_decay(
    model: nn.Module, names: Iterable[str], weight_decay: float, no_decay: Iterable[str]
) -> list[dict[str, Any]]:
    """Parameter groups of these parameters, in this order: with and without decay; none that is empty, unless both are:
    a stage of a pipeline may have nothing that is trained."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name in names:
        groups[kind(model, name) not in no_decay].append(model.get_parameter(name))
    made = [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0}
        for decayed, parameters in groups.items()
        if parameters
    ]
    return made or [{"params": [], "weight_decay": 0.0}]


def names(model: nn.Module) -> list[str]:
    """The names of all parameters that are trained, tied ones once. A frozen one is in no optimizer."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
