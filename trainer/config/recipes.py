"""Recipes beside other choices: `experiment=smoke model=mine` is smoke's training of another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import OmegaConf

from trainer.config.check import option_schema
from trainer.config.schema import OPTIONS
from trainer.errors import ConfigError


def leave_out_foreign_keys(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Takes those keys out of `raw`, composed of `overrides`, that only the recipe sets and that are another option's
    than the chosen one's. Hydra must be initialized.

    What a person types, or has in a file of an option, stays, to be refused. So does a key that no option has, unless
    the option was chosen by hand.
    """
    foreign = {group: unknown for group in OPTIONS if (unknown := _unknown(raw, group))}
    if not foreign:
        return
    rest = [text for text in overrides if text.lstrip("+").partition("=")[0] != "experiment"]
    plain = OmegaConf.to_container(hydra.compose("config", overrides=[*rest, "experiment=none"]), resolve=False)
    assert isinstance(plain, dict)
    for group, unknown in foreign.items():
        chosen = any(text.lstrip("+").startswith((f"{group}=", f"{group}.name=")) for text in overrides)
        others = {key for schema in OPTIONS[group].values() for key in schema.model_fields}
        for key in unknown:
            if key not in plain[group] and (chosen or key in others):
                del raw[group][key]


def _unknown(raw: dict[str, Any], group: str) -> set[str]:
    """Returns the keys that the chosen option of a group does not have."""
    try:
        schema = option_schema(group, str(raw[group]["name"]), raw["run"]["plugins"])
        return set(raw[group]) - set(schema.model_fields)
    except (ConfigError, LookupError, TypeError):
        return set()  # the check names what is wrong
