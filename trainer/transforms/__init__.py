"""Transforms: changes of a model before it is sharded, in place. The names of its parameters stay as they are; what a
transform adds has names of its own. It owns the values of what it adds, and says what a plain model has instead."""

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
Read = Callable[[str], Tensor]  # the value of the parameter of that name, whole


class Transform:
    """One change of a model. It is made of its section of `model.transforms`, and belongs to one run."""

    key = "model.transforms"  # of its section, for messages

    def __init__(self, config: Any):
        self.config = config

    def apply(self, model: nn.Module) -> None:
        """Changes the model, whose parameters may have no values yet. It is called for each model that is built of the
        run's config, and has to do the same to each."""
        raise NotImplementedError

    def initialise(self, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """Fills `value` if the parameter `name` is one that this transform has added, and returns whether it is."""
        return False

    def merged(self, name: str, value: Tensor, read: Read) -> Tensor | None:
        """Returns what a model without this transform has as `name`, of which `value` is the value in the one with it.
        None: nothing, the parameter is the transform's own. `read`: the others'. Called after `apply`."""
        return value


def apply(transforms: Sequence[Transform], model: nn.Module) -> frozenset[str]:
    """Applies them one after the other. Returns the names of the model's own parameters that they have frozen."""
    before = _trained(model)
    for transform in transforms:
        transform.apply(model)
        model.frozen_by_transforms = before - _trained(model)  # type: ignore[assignment]
    return before - _trained(model)


def undone(transforms: Sequence[Transform], name: str, read: Callable[[str], Tensor], first: int = 0) -> Tensor | None:
    """Returns the value of the parameter `name` in a model that has only the `first` of these transforms, which have
    been applied to one with all of them; None if it has no such parameter. `read`: values of that one."""
    if first == len(transforms):
        return read(name)

    def others(other: str) -> Tensor:
        value = undone(transforms, other, read, first + 1)
        assert value is not None, other
        return value

    value = undone(transforms, name, read, first + 1)
    return None if value is None else transforms[first].merged(name, value, others)


def _trained(model: nn.Module) -> frozenset[str]:
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if parameter.requires_grad)


def matching(key: str, patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Returns those of the dotted names that a pattern (`*`, `?`, `[01]`) matches, as a whole or from one of their dots
    on. Raises ConfigError for patterns that match none. `key`: of the config."""
    names, found, problems = list(names), set[str](), []
    known = {name for full in names for name in (full, full.rpartition(".")[2])}
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not matched:
            near = get_close_matches(pattern, known, n=NEAREST, cutoff=0.0)
            problems.append(f"{key}: '{pattern}' is not a part of the model{nearest_hint(pattern, near)}")
        found |= matched
    if problems:
        raise ConfigError(problems)
    return found
