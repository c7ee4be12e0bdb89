"""Turns raw values into a checked `Config`, or reports all problems. Imports nothing but plugins, creates nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.config.schema import SECTIONS, Config, Models, Section, Trained
from trainer.config.transforms import Transformed
from trainer.config.words import nearest_hint
from trainer.errors import ConfigError
from trainer.registry import OPTIONS, config_class, transform_class
from trainer.secrets import masked

UNSHARED_KEYS = ("weights", "transforms")  # keys of the run's own model that other models do not inherit
RESERVED_NAMES = ("model", "optimizer", "scaler")  # first parts of the names in a checkpoint
# The start of a key in a message, of a section that each trained model has of its own.
TRAINED_KEY = re.compile(rf"(?<![\w.])(?=(?:{'|'.join(Trained.model_fields)})[.=]\w)")


def validate(raw: dict[str, Any], world_size: int = 1) -> Config:
    """Validates composed values for a run on `world_size` processes. Raises ConfigError with every problem at once."""
    if not isinstance(raw, dict):
        raise ConfigError("the config is not a set of sections")
    problems = [
        f"{unknown}: no such key{nearest_hint(str(unknown), [*SECTIONS, *OPTIONS])}"
        for unknown in sorted(set(raw) - set(SECTIONS) - set(OPTIONS), key=str)
    ]
    sections: dict[str, Any] = {}
    for name in [*SECTIONS, *OPTIONS]:  # `run` first: it lists the packages that may be imported
        value = raw.get(name)
        try:
            if not isinstance(value, dict):
                raise ConfigError(f"{name}={value}: should be a section with keys of its own")
            plugins = sections["run"].plugins if "run" in sections else []
            schema = SECTIONS[name] if name in SECTIONS else config_class(name, str(value.get("name")), plugins)
            section = with_transforms(name, validate_section(name, schema, value), plugins)
            sections[name] = _with_trained(section, raw, plugins) if name == "models" else section
        except ConfigError as error:
            problems.extend(error.problems)
    problems.extend(dict.fromkeys(_conflicts(sections, world_size)))  # each once
    if problems:
        raise ConfigError(problems)
    return Config.model_validate(sections)


def _conflicts(sections: Mapping[str, Section], world_size: int) -> Iterator[str]:
    """Yields the conflicts of the valid sections; then, for each further model that is trained, the conflicts that it
    would have as the run's own model."""
    yield from _model_conflicts(sections, world_size)
    models: Any = sections.get("models")
    for name, trained_sections in models.trained.items() if models else ():
        for problem in _model_conflicts({**sections, **dict(trained_sections)}, world_size):
            yield in_trained(name, problem)


def _model_conflicts(sections: Mapping[str, Section], world_size: int) -> Iterator[str]:
    """Yields the problems of each section, those of the strategy first."""
    for name in sorted(sections, key="strategy".__ne__):
        yield from sections[name].problems(sections, world_size)


def in_trained(name: str, problem: str) -> str:
    """Returns a problem of the trained model `name` with the keys that it has in the config: `model.heads=3` becomes
    `models.trained.NAME.model.heads=3`."""
    return TRAINED_KEY.sub(f"models.trained.{name}.", problem)


def _with_trained(models: Models, raw: dict[str, Any], plugins: list[str]) -> Models:
    """Checks the sections of further trained models. Keys that they do not set are as in the run's own sections."""
    trained, problems = {}, []
    for name, value in models.trained.items():
        key, sections = f"models.trained.{name}", {}
        if not isinstance(value, dict) or (unknown := value.keys() - Trained.model_fields.keys()):
            which = f": no such key {', '.join(sorted(map(str, unknown)))}" if isinstance(value, dict) else ""
            problems.append(f"{key}{which}: should be a section with the keys model, optimizer, schedule")
            continue
        if not str(name).isidentifier() or name in RESERVED_NAMES or name in models.frozen:
            exclusions = f"none of {', '.join(RESERVED_NAMES)}, nor the name of a frozen model"
            problems.append(f"{key}: should have another name: a word, {exclusions}")
        for group in Trained.model_fields:
            group_value, run_value = value.get(group) or {}, raw.get(group) or {}
            if not isinstance(group_value, dict):
                problems.append(
                    f"{key}.{group}={masked(group_value)}: should be a section, such as {{name: {masked(group_value)}}}"
                )
                continue
            if not isinstance(run_value, dict):
                continue  # the check of the run's own section reports that
            is_same_option = group_value.get("name", run_value.get("name")) == run_value.get("name")
            values = (
                {**run_value, **{key: None for key in UNSHARED_KEYS if key in run_value}, **group_value}
                if is_same_option
                else group_value
            )
            try:
                schema = config_class(group, str(values.get("name")), plugins, f"{key}.{group}")
                sections[group] = with_transforms(
                    f"{key}.{group}", validate_section(f"{key}.{group}", schema, values), plugins
                )
            except ConfigError as error:
                problems.extend(error.problems)
        if getattr(sections.get("model"), "weights", None) is not None:
            problems.append(f"{key}.model.weights: only the run's own model can start with given weights")
        if sections.keys() == Trained.model_fields.keys():
            trained[name] = Trained(**sections)
    if problems:
        raise ConfigError(problems)
    return models.model_copy(update={"trained": trained})


def with_transforms(name: str, section: Any, plugins: Sequence[str]) -> Any:
    """Returns the section; the transforms of a model section become objects of their schemas. Raises ConfigError with
    all of their problems."""
    if not isinstance(section, Transformed):
        return section
    transforms, problems = {}, []
    for label, value in section.transforms.items():
        key = f"{name}.transforms.{label}"
        try:
            if not isinstance(value, dict):
                raise ConfigError(f"{key}={masked(value)}: should be a section, such as {{{label}: {{...}}}}")
            values = {"name": str(label), **value}
            transforms[str(label)] = validate_section(key, transform_class(key, str(values["name"]), plugins), values)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return section.model_copy(update={"transforms": transforms})


def validate_section(name: str, schema: type[Section], value: dict[str, Any]) -> Any:
    """Returns the section `name` as an object of its schema. Raises ConfigError with all problems of the section."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise ConfigError(_describe(name, schema, error)) from None


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every (dotted key, field) of a section's schema, nested sections flattened."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _describe(section: str, schema: type[Section], error: ValidationError) -> list[str]:
    """Returns pydantic's errors in one line each, with the whole key and its value."""
    lines = {}
    for item in error.errors():
        parts = [
            str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-", "tagged-"))
        ]
        # A union reports one error for each of its types, with the type as the last part: keep the key's own.
        key = ".".join([section, *[part for part in parts if part not in {"int", "str", "float", "list[str]", "none"}]])
        if item["type"] == "extra_forbidden":
            names = [f"{section}.{name}" for name, _ in keys(schema)]
            lines[key] = f"{key}: no such key{nearest_hint(key, names)}"
        elif item["type"] == "secret":  # not shown
            lines[key] = f"{key}: {item['msg']}"
        elif item["type"] == "missing":
            lines[key] = f"{key}: missing; this key has no default"
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.setdefault(key, f"{key}={masked(item['input'])}: {message}")
    return list(lines.values())
