"""Transforms: changes of a model before it is sharded, in place. Parameters keep their names, and those that a
transform adds have new ones. It initializes what it adds, and computes the weights that a plain model has instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.validate import nearest_hint
from trainer.errors import ConfigError

NEAREST = 5  # names in a message
Read = Callable[[str], Tensor]  # returns the whole value of the parameter of that name


class Transform:
    """One change of a model. It is built from its section of `model.transforms`, and belongs to one run."""

    key = "model.transforms"  # config key of its section, for messages

    def __init__(self, config: Any):
        self.config = config

    def apply(self, model: nn.Module) -> None:
        """Changes the model, whose parameters may have no values yet. It is called for each model that is built from
        the run's config, and must change all of them in the same way."""
        raise NotImplementedError

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """Fills `value` if the parameter `name` is one that this transform has added, and returns whether it is."""
        return False

    def merged(self, name: str, value: Tensor, read: Read) -> Tensor | None:
        """Returns the value of the parameter `name` in a model without this transform; `value` is the one with it.
        Returns None for a parameter that the transform has added. `read` reads others. It is called after `apply`."""
        return value


def apply(transforms: Sequence[Transform], model: nn.Module) -> frozenset[str]:
    """Applies transforms in their order. Returns the names of the model's original parameters that they have frozen."""
    before = _trained_names(model)
    for transform in transforms:
        transform.apply(model)
        model.frozen_by_transforms = before - _trained_names(model)  # type: ignore[assignment]
    return before - _trained_names(model)


def undo_transforms(
    transforms: Sequence[Transform], name: str, read: Callable[[str], Tensor], first: int = 0
) -> Tensor | None:
    """Returns the value of the parameter `name` in a model with only the first `first` of these transforms, or None if
    that model has no such parameter. `read` reads values of the model with all of them, which were applied to it."""
    if first == len(transforms):
        return read(name)

    def read_later(parameter_name: str) -> Tensor:
        value = undo_transforms(transforms, parameter_name, read, first + 1)
        assert value is not None, parameter_name
        return value

    value = undo_transforms(transforms, name, read, first + 1)
    return None if value is None else transforms[first].merged(name, value, read_later)


def _trained_names(model: nn.Module) -> frozenset[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in parameters if parameter.requires_grad)


def match_names(key: str, patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Returns the dotted names that a pattern (`*`, `?`, `[01]`) matches, as a whole or from one of their dots on.
    Raises ConfigError, with the config's `key`, for patterns that match none."""
    names, matches, problems = list(names), set[str](), []
    known_names = {name for full in names for name in (full, full.rpartition(".")[2])}
    for pattern in patterns:
        pattern_matches = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not pattern_matches:
            nearest = get_close_matches(pattern, known_names, n=NEAREST, cutoff=0.0)
            problems.append(f"{key}: '{pattern}' is not a part of the model{nearest_hint(pattern, nearest)}")
        matches |= pattern_matches
    if problems:
        raise ConfigError(problems)
    return matches
