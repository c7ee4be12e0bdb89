"""Applies recipes (experiments) such that a recipe never overrides an option that was chosen by hand.

The values that a recipe has for a group (`optimizer.lr`) belong to its own option of that group. If another option is
chosen, by `optimizer=lion`, `optimizer.name=...` or conf/local, that option's values hold; a recipe lists in `fits` the
other options that its values suit. The default recipe, which was not asked for, is dropped as a whole if the model, the
data or the objective is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra._internal.hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from trainer.errors import ConfigError
from trainer.registry import OPTIONS

FITS, ABOUT = "fits", "about"
DEFAULT = "shakespeare"  # the same as in conf/config.yaml
SUBJECT = ("model", "data", "objective")  # the groups that the default recipe is about
ADVICE = "experiment=NAME takes another"


class Loader(ConfigLoaderImpl):
    """Hydra's config loader, which also applies recipes: in our code, for `--cfg job`, for each job of a sweep."""

    recipe_message = ""  # about the recipe of the config that was composed last

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *args: Any, **options: Any
    ) -> DictConfig:
        composed = super().load_configuration(config_name, overrides, run_mode, *args, **options)
        load = super().load_configuration

        def compose(other_overrides: list[str]) -> DictConfig:
            return load(config_name, other_overrides, RunMode.RUN, from_shell=False)

        if run_mode == RunMode.RUN:  # nothing runs with the config of a whole sweep
            Loader.recipe_message = apply_recipe(composed, overrides, compose, self._sections(composed))
        with flag_override(composed, ["struct", "readonly"], False):
            composed.pop(FITS, None)
            composed.pop(ABOUT, None)
        return composed

    def _sections(self, composed: DictConfig) -> set[str]:
        """Returns the sections that the recipe has values for, if its file alone tells: then most commands need not be
        composed a second time."""
        recipe = self.repository.load_config(f"experiment/{composed.hydra.runtime.choices.get('experiment')}")
        return set() if recipe is None or recipe.defaults_list else set(map(str, recipe.config))


@dataclass(frozen=True)
class Recipe:
    """The description that an experiment has of itself."""

    name: str
    what: str = ""
    hardware: str = ""
    minutes: float | None = None
    """On that hardware."""
    metric: str = ""
    """A number of its evaluations."""
    target: float | None = None
    """Its value at the end."""
    run: str = ""
    """The command."""


def recipes(config_dir: Path | None = None) -> list[Recipe]:
    """Returns every experiment that ships with onecurve, and those in the `experiment` folder of `config_dir`.

    Raises ConfigError for a file with an unknown or wrong field in its description.
    """
    recipes_by_name: dict[str, Recipe] = {}
    for folder in [files("trainer.conf").joinpath("experiment"), *([config_dir / "experiment"] if config_dir else [])]:
        for path in sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else ():
            name, dot, kind = path.name.rpartition(".")
            if dot and kind == "yaml" and path.is_file():
                recipes_by_name[name] = _read_recipe(name, path.read_text(encoding="utf-8"))
    return sorted(recipes_by_name.values(), key=lambda recipe: recipe.name)


def _read_recipe(name: str, text: str) -> Recipe:
    try:
        recipe = Recipe(name, **(yaml.safe_load(text) or {}).get(ABOUT, {}))
        for key in ("minutes", "target"):
            if not isinstance(value := getattr(recipe, key), (int, float, type(None))):
                raise TypeError(f"{key}={value} is not a number")
        return recipe
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        keys = ", ".join(field.name for field in fields(Recipe)[1:])
        problem = str(error).splitlines()[0]
        raise ConfigError(f"experiment/{name}.yaml: `{ABOUT}` should have some of {keys}: {problem}") from None


def install() -> None:
    """Makes Hydra compose with our loader; Hydra has no setting for that."""
    hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[misc]


def apply_recipe(
    composed: DictConfig, overrides: Sequence[str], compose: Callable[[list[str]], DictConfig], recipe: set[str]
) -> str:
    """Restores the values of chosen options that the recipe replaced in `composed`. Returns a sentence on the recipe.

    `compose` makes a config of other overrides; `recipe`: the sections that the recipe has values for, empty: unknown.
    """
    name = str(composed.hydra.runtime.choices.get("experiment"))
    if name == "none":
        return f"none; {ADVICE}"
    keys = [OverridesParser.create().parse_override(text).key_or_group for text in overrides]
    recipe_overrides = [text for text, key in zip(overrides, keys, strict=True) if key == "experiment"]
    other_overrides = [text for text, key in zip(overrides, keys, strict=True) if key != "experiment"]
    is_default = not recipe_overrides and name == DEFAULT
    message = f"{name}{f', the default; {ADVICE}' if is_default else ''}"
    has_local = _has_local(composed)
    chosen_groups = {group for group in OPTIONS if group in keys or f"{group}.name" in keys}
    if not has_local and (
        not chosen_groups or (recipe and not chosen_groups & (recipe if recipe_overrides else recipe.union(SUBJECT)))
    ):
        return message
    hydra_overrides = [text for text in other_overrides if text.startswith("hydra.")]
    recipe_config = compose([*hydra_overrides, f"experiment={name}", *(["~local"] if has_local else [])])
    fits = OmegaConf.to_container(recipe_config.get(FITS, OmegaConf.create()))
    if not isinstance(fits, dict) or not fits.keys() <= OPTIONS.keys():
        raise ValueError(f"experiment={name}: `{FITS}` names options by group, such as {FITS}: {{data: [webdataset]}}")
    changed_groups = [group for group in OPTIONS if _option(composed, group) != _option(recipe_config, group)]
    changed_groups = [
        group for group in changed_groups if composed.hydra.runtime.choices.get(group) not in fits.get(group, ())
    ]
    if not changed_groups:
        return message
    plain = compose([*other_overrides, "experiment=none"])
    if is_default and (subject := [group for group in SUBJECT if group in changed_groups]):
        _replace(composed, plain, [str(key) for key in composed if key != "hydra"])
        composed.hydra.runtime.choices.experiment = "none"
        changes = ", ".join(
            _format_option(_option(plain, group), _option(recipe_config, group), group) for group in subject
        )
        return f"none: the default one, {name}, is not for {changes}; {ADVICE}"
    dropped = [key for group in changed_groups for key in _changed_keys(composed, plain, group)]
    _replace(composed, plain, changed_groups)
    return message + (f"; without its {', '.join(dropped)}: the options chosen have their own" if dropped else "")


def _has_local(config: DictConfig) -> bool:
    """Returns whether a person has a file of their own in conf/local; Hydra names the option even if there is none."""
    runtime = config.hydra.runtime
    files = [Path(source.path) for source in runtime.config_sources if source["schema"] == "file"]
    return any((folder / "local" / f"{runtime.choices.get('local')}.yaml").is_file() for folder in files)


def _option(config: DictConfig, group: str) -> tuple[Any, Any]:
    """Returns which option a group has: the file that was chosen, and the name that it or a person gave it."""
    section = _plain(config, group)
    return config.hydra.runtime.choices.get(group), section.get("name") if isinstance(section, dict) else section


def _format_option(option: tuple[Any, Any], default: tuple[Any, Any], group: str) -> str:
    """Returns the override by which an option differs from the default, as on a command line."""
    return f"{group}={option[0]}" if option[0] != default[0] else f"{group}.name={option[1]}"


def _changed_keys(composed: DictConfig, plain: DictConfig, group: str) -> list[str]:
    """Returns the keys of a group that the recipe has set."""
    values, plain_values = _plain(composed, group), _plain(plain, group)
    if not isinstance(values, dict) or not isinstance(plain_values, dict):
        return []
    return [f"{group}.{key}" for key, value in values.items() if key not in plain_values or plain_values[key] != value]


def _plain(config: DictConfig, group: str) -> Any:
    value = config._get_node(group)
    return OmegaConf.to_container(value, resolve=False) if isinstance(value, DictConfig) else value


def _replace(composed: DictConfig, plain: DictConfig, keys: Sequence[str]) -> None:
    with flag_override(composed, ["struct", "readonly"], False):
        for key in keys:
            if key in plain:
                composed[key] = plain._get_node(key)  # not its value: interpolations stay what they are
            else:
                del composed[key]
