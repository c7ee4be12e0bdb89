"""Builds the transforms of the run's model from the config."""

from __future__ import annotations

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.registry import TRANSFORMS, import_named, load
from trainer.transforms import Transform


def build_transforms(config: Config) -> list[Transform]:
    """Returns the transforms of the run's model, in their order in the config."""
    transforms = list[Transform]()
    for label, section in config.model.transforms.items():
        if section.name in TRANSFORMS:
            kind = load(TRANSFORMS[section.name].target)
        else:
            kind = import_named(key := f"model.transforms.{label}.name", section.name, config.run.plugins)
            if not (isinstance(kind, type) and issubclass(kind, Transform)):
                raise ConfigError(f"{key}={section.name}: should be a subclass of onecurve.Transform")
            if kind.apply is Transform.apply:
                raise ConfigError(f"{key}={section.name}: has no method `apply(model)` of its own")
        transforms.append(kind(section))
        transforms[-1].key = f"model.transforms.{label}"
    return transforms
