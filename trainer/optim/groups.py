"""Groups of parameters that are treated alike: by kind, which follows from the module and the parameter's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "InstanceNorm")
_TABLES = ("embed", "token", "position")  # in the names of lookup tables, which are not multiplied by


def kind(model: nn.Module, name: str) -> str:
    """Returns the kind of the parameter `name`, by its module, its own name and its shape: `bias`, `norm`, `embedding`,
    `vector` or `matrix`.

    A vector scales or gates: it has one dimension or none (LayerScale, a temperature), or more that are all 1 but one
    (a class token).
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
    """Returns the whole shape, even if DeepSpeed holds only a shard of the parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def by_decay(
    model: nn.Module, names: Iterable[str], weight_decay: float, no_decay: Iterable[str]
) -> list[dict[str, Any]]:
    """Returns parameter groups of these parameters: with decay, then without. Leaves out an empty group, unless both
    are empty: a pipeline stage may have no trained parameters."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name in names:
        groups[kind(model, name) not in no_decay].append(model.get_parameter(name))
    param_groups = [
        {"params": parameters, "weight_decay": weight_decay if has_decay else 0.0}
        for has_decay, parameters in groups.items()
        if parameters
    ]
    return param_groups or [{"params": [], "weight_decay": 0.0}]


def names(model: nn.Module) -> list[str]:
    """Returns the names of all trained parameters, tied ones once. Frozen ones are in no optimizer."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
