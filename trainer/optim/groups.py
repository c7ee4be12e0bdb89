"""Which parameters are treated alike: by what they are, found from their module and their own name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm")


def kind(model: nn.Module, name: str) -> str:
    """`bias`, `norm`, `embedding` or `matrix`: what the parameter `name` is, by its module and its own name."""
    path, _, leaf = name.rpartition(".")
    module = type(model.get_submodule(path)).__name__
    if leaf == "bias":
        return "bias"
    if any(norm in module for norm in _NORMS):  # also FusedLayerNorm, LlamaRMSNorm
        return "norm"
    return "embedding" if module == "Embedding" else "matrix"


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
