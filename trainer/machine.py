"""Checks whether this machine has what a config asks for."""

from __future__ import annotations

import torch

from trainer.config import Config
from trainer.config.validate import in_trained
from trainer.errors import ConfigError
from trainer.optional_packages import without_torchao
from trainer.precision import Precision
from trainer.registry import missing


def check_machine(config: Config, device: torch.device) -> None:
    """Raises ConfigError with all that the config asks for and this machine does not have."""
    problems = []
    try:
        precision = Precision.resolve(config.precision, device)
        if precision.compute == "fp8" and (reason := without_torchao()):
            problems.append(f"precision.compute=fp8: {reason}; nearest: precision=bf16")
    except ConfigError as error:
        problems += error.problems
    problems += missing(dict(config))
    for name, trained in config.models.trained.items():
        problems += [in_trained(name, problem) for problem in missing(dict(trained))]
    if problems:
        raise ConfigError(problems)
