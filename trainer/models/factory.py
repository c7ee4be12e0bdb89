"""From the config to the factory of the run's model: its class, then its transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from trainer.config import Config
from trainer.config.validate import in_trained
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.facts import Facts, NoExample
from trainer.models import Fill, ModelFactory, cast_parameters
from trainer.patches import without_values
from trainer.precision import DTYPES
from trainer.registry import plugin
from trainer.transforms import Transform, apply
from trainer.transforms.build import build_transforms


def model_factory(
    config: Config,
    tokenizer: Tokenizer,
    example: Callable[[], dict[str, torch.Tensor]] | None = None,
    pretrained: Fill | None = None,
    loaded: bool = False,
    leading_transforms: Sequence[Transform] = (),
) -> ModelFactory:
    """Returns the factory that makes the model and gives it its initial weights: drawn ones, unless they are
    `pretrained`, or loaded from a checkpoint. `leading_transforms` are applied before those of the config."""

    facts = Facts.of(config, tokenizer, example)
    transforms = [*leading_transforms, *build_transforms(config)]

    def make() -> nn.Module:
        model: Any = plugin(config, "model")(config.model, facts)
        frozen = apply(transforms, model)
        if frozen and reads_weights(config):
            model.not_saved = frozen
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"model={config.model.name}: all of its parameters are frozen, nothing would be trained")
        return model if config.precision.param == "fp32" else cast_parameters(model, DTYPES[config.precision.param])

    return ModelFactory(
        make, config.run.seed, example, pretrained, loaded, [transform.initialise for transform in transforms]
    )


def without_transforms(config: Config) -> Config:
    """Returns the config of the same run without the transforms of its model."""
    return config.model_copy(update={"model": config.model.model_copy(update={"transforms": {}})})


def knows_weights(config: Config) -> bool:
    """Returns whether `model.weights` means Hugging Face's weights to the run's model; a user's model may lack the key,
    or give it another meaning."""
    return hasattr(plugin(config, "model"), "family")


def reads_weights(config: Config) -> bool:
    """Returns whether the run starts with the values of `model.weights`."""
    return getattr(config.model, "weights", None) is not None and knows_weights(config)


def not_saved(config: Config, tokenizer: Tokenizer) -> frozenset[str]:
    """Returns the parameters that checkpoints of the run leave out: those of `model.weights` that transforms have
    frozen, which each attempt reads again. (Drawn values are saved, since other processors draw other bits.)"""
    if not (config.model.transforms and reads_weights(config)):
        return frozenset()
    try:
        with without_values():
            model: Any = model_factory(config, tokenizer).build()
    except NoExample:
        raise ConfigError(
            f"model.weights={config.model.weights}: {config.model.name} looks at the data while it is made "
            "(`facts.example`), so it cannot start with given weights"
        ) from None
    return getattr(model, "not_saved", frozenset())


def check_transforms(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if a transform does not fit the run's model, or another trained model. Skips a model that
    looks at the data while it is made."""
    problems = _find_unfit_transforms(config, tokenizer)
    for name, section in sorted(config.models.trained.items()):
        model_problems = _find_unfit_transforms(config.model_copy(update={"model": section.model}), tokenizer)
        problems += [in_trained(name, problem) for problem in model_problems]
    if problems:
        raise ConfigError(problems)


def _find_unfit_transforms(config: Config, tokenizer: Tokenizer) -> list[str]:
    try:
        if config.model.transforms:
            with suppress(NoExample), without_values():
                model_factory(config, tokenizer).build()
    except ConfigError as error:
        return error.problems
    return []
