"""Raw values in, a checked `Config` or all problems out. Nothing is imported, read or created for it but plugins."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from trainer.config import rules
from trainer.config.schema import OPTIONS, SECTIONS, Config, Models, Plugin, Section, Trained
from trainer.config.transforms import TRANSFORMS, Transformed
from trainer.errors import ConfigError
from trainer.secrets import masked

WITH_CLASSES = ("model", "objective", "strategy", "optimizer", "schedule")  # groups that take classes of users
TAKEN = ("model", "optimizer", "scaler")  # how names of what a checkpoint holds begin
OF_ONE_MODEL = ("weights", "transforms")  # keys of the run's own model that others do not take over
OWN = "package.module:Class"
INSTEAD = {"data": "; functions of yours change its samples by data.maps"}


def check(raw: dict[str, Any], world_size: int = 1) -> Config:
    """Validates composed values for a run on `world_size` processes. Raises ConfigError with every problem at once."""
    if not isinstance(raw, dict):
        raise ConfigError("the config is no set of sections")
    problems = [
        f"{unknown}: no such key{did_you_mean(str(unknown), [*SECTIONS, *OPTIONS])}"
        for unknown in sorted(set(raw) - set(SECTIONS) - set(OPTIONS), key=str)
    ]
    sections: dict[str, Any] = {}
    for name in [*SECTIONS, *OPTIONS]:  # `run` first: it says which packages may be imported
        value = raw.get(name)
        try:
            if not isinstance(value, dict):
                raise ConfigError(f"{name}={value}: should be a section with keys of its own")
            plugins = sections["run"].plugins if "run" in sections else []
            schema = SECTIONS[name] if name in SECTIONS else option_schema(name, str(value.get("name")), plugins)
            sections[name] = with_transforms(name, checked(name, schema, value), plugins)
            if name == "models":
                sections[name] = _with_trained(sections[name], raw, plugins)
        except ConfigError as error:
            problems.extend(error.problems)
    problems.extend(rules.problems(sections, world_size))
    if problems:
        raise ConfigError(problems)
    return Config.model_validate(sections)


def _with_trained(models: Models, raw: dict[str, Any], plugins: list[str]) -> Models:
    """Checks the sections of models that are trained beside the run's: what they do not say is as in its own."""
    trained, problems = {}, []
    for name, given in models.trained.items():
        key, made = f"models.trained.{name}", {}
        if not isinstance(given, dict) or (unknown := given.keys() - Trained.model_fields.keys()):
            which = f": no such key {', '.join(sorted(map(str, unknown)))}" if isinstance(given, dict) else ""
            problems.append(f"{key}{which}: should be a section with the keys model, optimizer, schedule")
            continue
        if not str(name).isidentifier() or name in TAKEN or name in models.frozen:
            others = f"none of {', '.join(TAKEN)}, nor the name of a frozen model"
            problems.append(f"{key}: should have another name: a word, {others}")
        for group in Trained.model_fields:
            own, base = given.get(group) or {}, raw.get(group) or {}
            if not isinstance(own, dict):
                problems.append(f"{key}.{group}={masked(own)}: should be a section, such as {{name: {masked(own)}}}")
                continue
            if not isinstance(base, dict):
                continue  # which is told of the run's own section
            same = own.get("name", base.get("name")) == base.get("name")
            values = {**base, **{key: None for key in OF_ONE_MODEL if key in base}, **own} if same else own
            try:
                schema = option_schema(group, str(values.get("name")), plugins, f"{key}.{group}")
                made[group] = with_transforms(f"{key}.{group}", checked(f"{key}.{group}", schema, values), plugins)
            except ConfigError as error:
                problems.extend(error.problems)
        if getattr(made.get("model"), "weights", None) is not None:
            problems.append(f"{key}.model.weights: only the run's own model can start with given weights")
        if made.keys() == Trained.model_fields.keys():
            trained[name] = Trained(**made)
    if problems:
        raise ConfigError(problems)
    return models.model_copy(update={"trained": trained})


def with_transforms(name: str, section: Any, plugins: Sequence[str]) -> Any:
    """The section, each of its transforms (if it is a model's) as an object of the schema of its own. Raises
    ConfigError with all of their problems."""
    if not isinstance(section, Transformed):
        return section
    made, problems = {}, []
    for label, given in section.transforms.items():
        key = f"{name}.transforms.{label}"
        try:
            if not isinstance(given, dict):
                raise ConfigError(f"{key}={masked(given)}: should be a section, such as {{{label}: {{...}}}}")
            values = {"name": str(label), **given}
            made[str(label)] = checked(key, _transform_schema(key, str(values["name"]), plugins), values)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return section.model_copy(update={"transforms": made})


def _transform_schema(key: str, name: str, plugins: Sequence[str]) -> type[Plugin]:
    if ":" in name:
        return import_plugin(f"{key}.name", name, plugins).Config
    if name not in TRANSFORMS:
        own = f"; one of yours has a key name={OWN}"
        raise ConfigError(f"{key}: no such transform{did_you_mean(name, TRANSFORMS)}{own}")
    return TRANSFORMS[name]


def checked(name: str, schema: type[Section], value: dict[str, Any]) -> Any:
    """The section `name` as an object of its schema. Raises ConfigError with all problems of the section."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise ConfigError(_describe(name, schema, error)) from None


def option_schema(group: str, name: str, plugins: list[str], section: str = "") -> type[Plugin]:
    """The schema of option `name` of a group: a built-in one, or the `Config` of a user's class. `section`: where it is
    chosen, if not in the group's own."""
    key = section or group
    if ":" not in name:
        if name not in OPTIONS[group]:
            raise ConfigError(f"{key}.name={name}: no such option{did_you_mean(name, OPTIONS[group])}")
        return OPTIONS[group][name]
    if group not in WITH_CLASSES:
        raise ConfigError(f"{key}.name={name}: should be one of {', '.join(OPTIONS[group])}{INSTEAD.get(group, '')}")
    schema = import_plugin(f"{key}.name", name, plugins).Config
    return transformed(name, schema) if group == "model" else schema


@cache
def transformed(name: str, schema: type[Plugin]) -> type[Plugin]:
    """The keys of a user's model, and `transforms`."""
    if issubclass(schema, Transformed):
        return schema
    if "transforms" in schema.model_fields:
        raise ConfigError(f"model.name={name}: its key `transforms` is one that every model has; rename it")
    return create_model(schema.__name__, __base__=(schema, Transformed), __module__=schema.__module__)


def import_plugin(key: str, target: str, plugins: Sequence[str]) -> Any:
    """The class that `package.module:Class` names, if its package is on the user's list `run.plugins`."""
    found = import_named(key, target, plugins)
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, Plugin)):
        raise ConfigError(f"{key}={target}: needs a class attribute `Config`, a subclass of trainer.config.Plugin")
    return found


def import_named(key: str, target: str, plugins: Sequence[str]) -> Any:
    """What `package.module:name` names, if its package is on the user's list `run.plugins`."""
    module, _, attribute = target.partition(":")
    package = module.partition(".")[0]
    if package not in plugins:
        way = f"add run.plugins=[{package}] (--plugins {package} to sample, evaluate, replay and export)"
        raise ConfigError(f"{key}={target}: package '{package}' is not allowed; if you trust it, {way}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{key}={target}: cannot be imported: {type(error).__name__}: {error}") from error


def did_you_mean(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(sorted(known))}"


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, field) of a section's schema, nested sections flattened."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _describe(section: str, schema: type[Section], error: ValidationError) -> list[str]:
    """pydantic's errors in one line each, with the whole key and the value given."""
    lines = {}
    for item in error.errors():
        parts = [
            str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-", "tagged-"))
        ]
        # A union reports one error for each of its types, with the type as the last part: keep the key's own.
        key = ".".join([section, *[part for part in parts if part not in {"int", "str", "float", "list[str]", "none"}]])
        if item["type"] == "extra_forbidden":
            known = [f"{section}.{name}" for name, _ in keys(schema)]
            lines[key] = f"{key}: no such key{did_you_mean(key, known)}"
        elif item["type"] == "secret":  # not shown
            lines[key] = f"{key}: {item['msg']}"
        elif item["type"] == "missing":
            lines[key] = f"{key}: missing; this key has no default"
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.setdefault(key, f"{key}={masked(item['input'])}: {message}")
    return list(lines.values())
