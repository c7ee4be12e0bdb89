"""Composes raw values from overrides with Hydra. Writes nothing, so that any number of ranks may compose at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import recipes
from trainer.config.schema import SECTIONS, Config
from trainer.config.validate import validate, validate_section
from trainer.config.words import nearest_hint
from trainer.errors import ConfigError, first_line
from trainer.registry import OPTIONS, config_class
from trainer.secrets import shown_override


def load(overrides: Sequence[str], world_size: int = 1, config_dir: str | None = None) -> Config:
    """Returns the checked config of a command line. Raises ConfigError with all its problems at once."""
    return config_of(*compose(overrides, config_dir), world_size)


def config_of(raw: dict[str, Any], problems: list[str], world_size: int) -> Config:
    config = None
    try:
        if raw:
            config = validate(raw, world_size)
            problems += homeless_paths(config)
    except ConfigError as error:
        problems += error.problems
    if problems or config is None:
        raise ConfigError(problems)
    return config


def homeless_paths(config: Config) -> list[str]:
    """Returns a problem for each path that begins with `~` if the user has no home, as in some containers."""
    paths = {"run.dir": config.run.dir, "data.cache": config.data.cache, "data.tokenizer": config.data.tokenizer}
    paths["model.weights"] = getattr(config.model, "weights", None) or ""
    if os.path.expanduser("~") != "~":  # it stays `~` where there is no home
        return []
    advice = "this user has no home folder: set HOME, or give a folder"
    hints = {"data.cache": " (also by ONECURVE_CACHE)"}
    return [f"{key}={path}: {advice}{hints.get(key, '')}" for key, path in paths.items() if path.startswith("~")]


def load_sized(
    overrides: Sequence[str],
    procs: int | None,
    config_dir: str | None = None,
    otherwise: Callable[[], int] = lambda: 1,
) -> tuple[Config, int]:
    """Returns the checked config, and the number of processes it is checked for: `procs`, or that of its section
    `launch`, or the result of `otherwise`. Raises ConfigError with all problems at once."""
    raw, problems = compose(overrides, config_dir)
    try:
        launch, run = raw["launch"], raw["run"]
        schema = config_class("launch", launch["name"], run["plugins"])
        procs = procs or validate_section("launch", schema, launch).processes
    except (ConfigError, LookupError, TypeError):
        pass  # the check below reports it
    procs = procs or otherwise()
    return config_of(raw, problems, procs), procs


def load_composed(path: str | os.PathLike[str], world_size: int) -> Config:
    """Returns the config in a file with all of `Config.with_secrets()`, as a launcher writes it: each attempt of a run
    has the same, even if the YAML files change meanwhile. Raises ConfigError."""
    try:
        raw = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {first_line(error)}") from None
    return validate(raw, world_size)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Returns the raw values of a command line, and the problems of its overrides. Wrong overrides are left out."""
    problems: list[str] = []
    if config_dir and not os.path.isdir(config_dir):
        problems.append(f"--config-dir {config_dir}: no such folder")
        config_dir = None
    valid: list[str] = []
    parser = OverridesParser.create()
    for text in overrides:
        if text.startswith("--"):
            problems.append(f"{shown_override(text)}: options are written key=value, without dashes")
            continue
        try:
            parser.parse_overrides([text])
            valid.append(text)
        except OverrideParseException:
            if quoted := quote(text, parser):
                valid.append(quoted)
                continue
            reason = "is not an override; write key=value (quote values with spaces, commas or braces)"
            problems.append(f"{shown_override(text)}: {reason}")
    extra = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
    with in_hydra():
        while True:
            try:
                arguments = [*extra, *map(parse_leniently, valid)]
                return raw_values(hydra.compose("config", overrides=arguments)), problems
            except MissingConfigException as error:
                group, option = _missing(error)
                culprit = next((text for text in valid if text in (f"{group}={option}", f"+{group}={option}")), None)
                problems.append(f"{group}={option}: no such option{nearest_hint(option, error.options or [])}")
                if culprit is None:
                    return {}, problems
                valid.remove(culprit)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                return {}, [*problems, " ".join(str(error if str(error) else error.__cause__).split())]


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the values that a run was resolved to, with overrides applied. Raises ConfigError."""
    changes = OmegaConf.create()
    try:
        for key, _, value in (text.partition("=") for text in overrides):
            # A command or an address is plain text: a colon in it does not make it a mapping.
            plain = value[:1] in ("[", "{", "'", '"') or value == "null"
            OmegaConf.update(changes, key, yaml.safe_load(value) if plain else value)
        new_values = OmegaConf.to_container(changes, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{first_line(error)}; write key=value, such as data.shards='...'") from None
    return _merge(raw, new_values)


def _merge(raw: Any, changes: Any) -> Any:
    if not (isinstance(raw, dict) and isinstance(changes, dict)):
        return changes
    return raw | {key: _merge(raw.get(key), value) for key, value in changes.items()}


def quote(text: str, parser: OverridesParser) -> str | None:
    """Returns the override with its value in quotes if that makes it valid (paths and URLs with braces, `~`, `?`)."""
    key, equals, value = text.partition("=")
    if not equals or not value or value[0] in "{[\"'":
        return None
    escaped = value.replace("'", "\\'")
    quoted = f"{key}='{escaped}'"
    try:
        parser.parse_overrides([quoted])
    except OverrideParseException:
        return None
    return quoted


def complete(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that a run of an earlier version was resolved to, with the defaults of newer keys."""
    sections = {name: values for name, values in raw.items() if isinstance(values, dict)}
    option_names = {
        group: values["name"] for group, values in sections.items() if values.get("name") in OPTIONS.get(group, ())
    }
    defaults, _ = compose(["experiment=none", *(f"{group}={name}" for group, name in option_names.items())])
    known_sections = sections.keys() & {*SECTIONS, *option_names}
    new_sections = {name: defaults[name] for name in SECTIONS if name not in raw}
    return new_sections | raw | {name: {**defaults[name], **sections[name]} for name in known_sections}


def raw_values(config: DictConfig) -> dict[str, Any]:
    """Returns a composed config as plain values, interpolations resolved. Raises OmegaConfBaseException."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in ("hydra", "experiment")}


def options(group: str) -> list[str]:
    """Returns the options of a config group that ship with onecurve."""
    with in_hydra():
        return GlobalHydra.instance().config_loader().get_group_options(group)


def parse_leniently(text: str) -> str:
    """Turns `key=value` into `++key=value`: Hydra then accepts unknown keys, and our own check reports all of them."""
    override: Override = OverridesParser.create().parse_override(text)
    key = override.key_or_group
    is_group = key in (*OPTIONS, "experiment") or "/" in key or override.package is not None
    return text if is_group or override.type != OverrideType.CHANGE else f"++{text}"


def _missing(error: MissingConfigException) -> tuple[str, str]:
    group, _, option = str(error.missing_cfg_file or "?").rpartition("/")
    return group or "config", re.sub(r"\.yaml$", "", option)


def recipe_message() -> str:
    """Returns a sentence on the recipe of the config that was composed last: its name, and what it does not decide."""
    return recipes.Loader.recipe_message


def in_hydra() -> AbstractContextManager[None]:
    GlobalHydra.instance().clear()
    recipes.install()
    return hydra.initialize_config_module("trainer.conf", version_base="1.3")
