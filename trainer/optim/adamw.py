"""AdamW (Loshchilov & Hutter 2019) with weight decay by kind of parameter."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config import schema

_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm")


def adamw(config: schema.AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW on the model's parameters, in two groups: with and without decay."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if kind(model, name) in config.no_decay else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def kind(model: nn.Module, name: str) -> str:
    """`bias`, `norm`, `embedding` or `matrix`: what the parameter `name` is, by its module and its own name."""
    path, _, leaf = name.rpartition(".")
    module = type(model.get_submodule(path)).__name__
    if leaf == "bias":
        return "bias"
    if module.startswith(_NORMS):
        return "norm"
    return "embedding" if module == "Embedding" else "matrix"
