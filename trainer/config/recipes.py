"""Recipes beside what a person chooses: a recipe never beats an option that was chosen by hand.

The values that a recipe has for a group (`optimizer.lr`) are made for its own option of that group. Where another one
is chosen, by `optimizer=lion`, `optimizer.name=...` or conf/local, that option's values hold; a recipe says in `fits`
which others its values are made for as well. The default recipe, which nobody named, is left out as a whole where the
model, the data or the objective is another one.
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
DEFAULT = "shakespeare"  # as conf/config.yaml has it
SUBJECT = ("model", "data", "objective")  # what the default recipe is a recipe for
ADVICE = "experiment=NAME takes another"


class Loader(ConfigLoaderImpl):
    """Hydra's, for all that composes: ours, `--cfg job`, each job of a sweep."""

    recipe_message = ""  # of the recipe of the config that was composed last

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *args: Any, **more: Any
    ) -> DictConfig:
        composed = super().load_configuration(config_name, overrides, run_mode, *args, **more)
        again = super().load_configuration

        def compose(other: list[str]) -> DictConfig:
            return again(config_name, other, RunMode.RUN, from_shell=False)

        if run_mode == RunMode.RUN:  # the config of a whole sweep is none that anything runs with
            Loader.recipe_message = apply_recipe(composed, overrides, compose, self._sections(composed))
        with flag_override(composed, ["struct", "readonly"], False):
            composed.pop(FITS, None)
            composed.pop(ABOUT, None)
        return composed

    def _sections(self, composed: DictConfig) -> set[str]:
        """Returns the sections that the recipe has values for, where its file alone says so: most commands need not be
        composed again to know that it took nothing."""
        found = self.repository.load_config(f"experiment/{composed.hydra.runtime.choices.get('experiment')}")
        return set() if found is None or found.defaults_list else set(map(str, found.config))


@dataclass(frozen=True)
class Recipe:
    """What an experiment says of itself."""

    name: str
    what: str = ""
    hardware: str = ""
    minutes: float | None = None
    """On that hardware."""
    metric: str = ""
    """A number of its evaluations."""
    target: float | None = None
    """What that comes to at the end."""
    run: str = ""
    """The command."""


def recipes(config_dir: Path | None = None) -> list[Recipe]:
    """Returns every experiment that ships with onecurve, and those in the `experiment` folder of `config_dir`.

    Raises ConfigError for a file that says of itself what none does.
    """
    found: dict[str, Recipe] = {}
    for folder in [files("trainer.conf").joinpath("experiment"), *([config_dir / "experiment"] if config_dir else [])]:
        for path in sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else ():
            name, dot, kind = path.name.rpartition(".")
            if dot and kind == "yaml" and path.is_file():
                found[name] = _about(name, path.read_text(encoding="utf-8"))
    return sorted(found.values(), key=lambda recipe: recipe.name)


def _about(name: str, text: str) -> Recipe:
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
    """Makes Hydra compose with our loader; it has no setting for that."""
    hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[misc]


def apply_recipe(
    composed: DictConfig, overrides: Sequence[str], compose: Callable[[list[str]], DictConfig], recipe: set[str]
) -> str:
    """Gives `composed` back what the recipe took from options that were chosen. `compose` makes a config of other
    overrides; `recipe` are the sections that the recipe has values for, if that is known. Returns a sentence on it."""
    name = str(composed.hydra.runtime.choices.get("experiment"))
    if name == "none":
        return f"none; {ADVICE}"
    keys = [OverridesParser.create().parse_override(text).key_or_group for text in overrides]
    named = [text for text, key in zip(overrides, keys, strict=True) if key == "experiment"]
    others = [text for text, key in zip(overrides, keys, strict=True) if key != "experiment"]
    by_default = not named and name == DEFAULT
    told = f"{name}{f', the default; {ADVICE}' if by_default else ''}"
    local = _has_local(composed)
    chosen = {group for group in OPTIONS if group in keys or f"{group}.name" in keys}
    if not local and (not chosen or (recipe and not chosen & (recipe if named else recipe.union(SUBJECT)))):
        return told
    of_hydra = [text for text in others if text.startswith("hydra.")]
    own = compose([*of_hydra, f"experiment={name}", *(["~local"] if local else [])])
    fits = OmegaConf.to_container(own.get(FITS, OmegaConf.create()))
    if not isinstance(fits, dict) or not fits.keys() <= OPTIONS.keys():
        raise ValueError(f"experiment={name}: `{FITS}` names options by group, such as {FITS}: {{data: [webdataset]}}")
    other = [group for group in OPTIONS if _option(composed, group) != _option(own, group)]
    other = [group for group in other if composed.hydra.runtime.choices.get(group) not in fits.get(group, ())]
    if not other:
        return told
    plain = compose([*others, "experiment=none"])
    if by_default and (subject := [group for group in SUBJECT if group in other]):
        _replace(composed, plain, [str(key) for key in composed if key != "hydra"])
        composed.hydra.runtime.choices.experiment = "none"
        instead = ", ".join(_written(_option(plain, group), _option(own, group), group) for group in subject)
        return f"none: the default one, {name}, is not for {instead}; {ADVICE}"
    dropped = [key for group in other for key in _differing(composed, plain, group)]
    _replace(composed, plain, other)
    return told + (f"; without its {', '.join(dropped)}: the options chosen have their own" if dropped else "")


def _has_local(config: DictConfig) -> bool:
    """Returns whether a person has a file of their own in conf/local; Hydra names the option even if there is none."""
    runtime = config.hydra.runtime
    files = [Path(source.path) for source in runtime.config_sources if source["schema"] == "file"]
    return any((folder / "local" / f"{runtime.choices.get('local')}.yaml").is_file() for folder in files)


def _option(config: DictConfig, group: str) -> tuple[Any, Any]:
    """Returns which option a group has: the file that was chosen, and the name that it or a person gave it."""
    section = _plain(config, group)
    return config.hydra.runtime.choices.get(group), section.get("name") if isinstance(section, dict) else section


def _written(option: tuple[Any, Any], other: tuple[Any, Any], group: str) -> str:
    """Returns what makes an option another one, as it is written on a command line."""
    return f"{group}={option[0]}" if option[0] != other[0] else f"{group}.name={option[1]}"


def _differing(composed: DictConfig, plain: DictConfig, group: str) -> list[str]:
    """Returns the keys of a group that the recipe has set."""
    here, there = _plain(composed, group), _plain(plain, group)
    if not isinstance(here, dict) or not isinstance(there, dict):
        return []
    return [f"{group}.{key}" for key, value in here.items() if key not in there or there[key] != value]


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
