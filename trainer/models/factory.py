"""From the config to what makes the run's model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trainer.config import Config
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.facts import Facts
from trainer.models import Fill, ModelFactory, of_type
from trainer.precision import DTYPES
from trainer.registry import plugin


def model_factory(
    config: Config,
    tokenizer: Tokenizer,
    example: Callable[[], dict[str, torch.Tensor]] | None = None,
    given: Fill | None = None,
    loaded: bool = False,
) -> ModelFactory:
    """What makes the model and gives it its initial weights: drawn ones, unless others are given, or all of them are
    loaded from a checkpoint."""

    facts = Facts.of(config, tokenizer, example)

    def make() -> nn.Module:
        model = plugin(config, "model")(config.model, facts)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"model={config.model.name}: all of its parameters are frozen, nothing would be trained")
        return model if config.precision.param == "fp32" else of_type(model, DTYPES[config.precision.param])

    return ModelFactory(make, config.run.seed, example, given, loaded)
