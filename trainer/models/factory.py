"""From the config to what makes the run's model: its class, then its transforms."""

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
from trainer.models import Fill, ModelFactory, of_type
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
    before: Sequence[Transform] = (),
) -> ModelFactory:
    """What makes the model and gives it its initial weights: drawn ones, unless others are given, or loaded from a
    checkpoint. `before`: transforms that are applied before those of the config."""

    facts, changes = Facts.of(config, tokenizer, example), [*before, *build_transforms(config)]

    def make() -> nn.Module:
        model: Any = plugin(config, "model")(config.model, facts)
        frozen = apply(changes, model)
        if frozen and reads_weights(config):
            model.not_saved = frozen
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"model={config.model.name}: all of its parameters are frozen, nothing would be trained")
        return model if config.precision.param == "fp32" else of_type(model, DTYPES[config.precision.param])

    return ModelFactory(make, config.run.seed, example, pretrained, loaded, [change.initialise for change in changes])


def without_transforms(config: Config) -> Config:
    """The config of the same run, whose model is as its class makes it."""
    return config.model_copy(update={"model": config.model.model_copy(update={"transforms": {}})})


def knows_weights(config: Config) -> bool:
    """Whether `model.weights` means weights of Hugging Face's to the run's model; that of a user's may lack the key, or
    mean otherwise."""
    return hasattr(plugin(config, "model"), "family")


def reads_weights(config: Config) -> bool:
    """Whether the run starts with the values of `model.weights`."""
    return getattr(config.model, "weights", None) is not None and knows_weights(config)


def not_saved(config: Config, tokenizer: Tokenizer) -> frozenset[str]:
    """The parameters that checkpoints of the run leave out: what transforms have frozen of `model.weights`, which each
    life reads again. (Values that are drawn are saved: other processors draw other bits.)"""
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
    """Raises ConfigError where a transform does not fit the run's model, or another one that is trained. A model that
    looks at the data while it is made is not made here."""
    problems = _unfit_transforms(config, tokenizer)
    for name, other in sorted(config.models.trained.items()):
        its = _unfit_transforms(config.model_copy(update={"model": other.model}), tokenizer)
        problems += [in_trained(name, problem) for problem in its]
    if problems:
        raise ConfigError(problems)


def _unfit_transforms(config: Config, tokenizer: Tokenizer) -> list[str]:
    try:
        if config.model.transforms:
            with suppress(NoExample), without_values():
                model_factory(config, tokenizer).build()
    except ConfigError as error:
        return error.problems
    return []
