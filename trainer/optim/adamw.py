"""AdamW (Loshchilov & Hutter 2019) with weight decay by kind of parameter."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config import schema
from trainer.optim.groups import by_decay, names


def adamw(config: schema.AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW on the model's parameters, in two groups: with and without decay."""
    groups = by_decay(model, names(model), config.weight_decay, config.no_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
