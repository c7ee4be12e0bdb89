"""AdamW (Loshchilov & Hutter 2019) with weight decay by kind of parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.config import schema
from trainer.errors import ConfigError
from trainer.optim.groups import by_decay, names
from trainer.optional_packages import without_apex, without_torchao


def adamw(config: schema.AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW in the configured implementation, on the model's parameters, in two groups: with and without decay.

    Raises ConfigError if this machine does not have the implementation.
    """
    if problem := missing(config):
        raise ConfigError(problem)
    groups = by_decay(model, names(model), config.weight_decay, config.no_decay)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.implementation == "apex":
        from trainer.optim.apex import ApexAdamW  # late: it imports Apex

        return ApexAdamW(groups, **options, adam_w_mode=True)
    if config.implementation == "8bit":
        from trainer.optim.adamw8bit import AdamW8bit  # late: it imports torchao

        return AdamW8bit(groups, **options)
    foreach = config.implementation == "foreach"
    return torch.optim.AdamW(groups, **options, foreach=foreach, fused=not foreach)


def missing(config: schema.AdamW) -> str:
    """Returns what the implementation needs and this machine lacks, as a problem of the config; empty if nothing."""
    reason = ""
    if config.implementation == "apex":
        reason = without_apex("FusedAdam")
    elif config.implementation == "8bit":
        reason = without_torchao()
    key = f"optimizer.implementation={config.implementation}"
    return f"{key}: {reason}; nearest: optimizer.implementation=fused" if reason else ""
