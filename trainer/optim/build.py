"""From the config to the optimizer of a model, and to its schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.config import Config
from trainer.optim.ema import track_average
from trainer.optim.schedule import Schedule
from trainer.registry import plugin


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    section: Any = config.optimizer
    if config.train.deterministic == "topology":
        section = section.elementwise()
    optimizer = plugin(config, "optimizer")(section, model)
    decay = getattr(config.optimizer, "ema", None)  # the Config of a user's optimizer may lack it
    return track_average(optimizer, decay) if decay else optimizer


def build_schedule(config: Config) -> Schedule:
    return plugin(config, "schedule")(config.schedule, config.optimizer.lr, config.train.steps)
