"""Raw values in, a checked `Config` or all problems out. Nothing is imported, read or created for it but plugins."""

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

OF_ONE_MODEL = ("weights", "transforms")  # keys of the run's own model that others do not take over
TAKEN = ("model", "optimizer", "scaler")  # how names of what a checkpoint holds begin
# Where a key of one of the sections that such a model has of its own begins in a message.
ITS_KEY = re.compile(rf"(?<![\w.])(?=(?:{'|'.join(Trained.model_fields)})[.=]\w)")


def validate(raw: dict[str, Any], world_size: int = 1) -> Config:
    """Validates composed values for a run on `world_size` processes. Raises ConfigError with every problem at once."""
    if not isinstance(raw, dict):
        raise ConfigError("the config is not a set of sections")
    problems = [
        f"{unknown}: no such key{nearest_hint(str(unknown), [*SECTIONS, *OPTIONS])}"
        for unknown in sorted(set(raw) - set(SECTIONS) - set(OPTIONS), key=str)
    ]
    sections: dict[str, Any] = {}
    for name in [*SECTIONS, *OPTIONS]:  # `run` first: it says which packages may be imported
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
    problems.extend(dict.fromkeys(_contradictions(sections, world_size)))  # each once
    if problems:
        raise ConfigError(problems)
    return Config.model_validate(sections)


def _contradictions(sections: Mapping[str, Section], world_size: int) -> Iterator[str]:
    """Yields what the valid sections refuse; then, of each model that is trained beside the run's own, what they would
    refuse if it were the run's."""
    yield from _of_one_model(sections, world_size)
    models: Any = sections.get("models")
    for name, other in models.trained.items() if models else ():
        for problem in _of_one_model({**sections, **dict(other)}, world_size):
            yield in_trained(name, problem)


def _of_one_model(sections: Mapping[str, Section], world_size: int) -> Iterator[str]:
    """Asks each section, the strategy first: other sections say what does not fit it."""
    for name in sorted(sections, key="strategy".__ne__):
        yield from sections[name].problems(sections, world_size)


def in_trained(name: str, problem: str) -> str:
    """Returns a problem of the model `name`, which is trained beside the run's own, with the keys that it has in the
    config: `model.heads=3` as `models.trained.NAME.model.heads=3`."""
    return ITS_KEY.sub(f"models.trained.{name}.", problem)


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
                schema = config_class(group, str(values.get("name")), plugins, f"{key}.{group}")
                made[group] = with_transforms(
                    f"{key}.{group}", validate_section(f"{key}.{group}", schema, values), plugins
                )
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
            made[str(label)] = validate_section(key, transform_class(key, str(values["name"]), plugins), values)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return section.model_copy(update={"transforms": made})


def validate_section(name: str, schema: type[Section], value: dict[str, Any]) -> Any:
    """The section `name` as an object of its schema. Raises ConfigError with all problems of the section."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise ConfigError(_describe(name, schema, error)) from None


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
            lines[key] = f"{key}: no such key{nearest_hint(key, known)}"
        elif item["type"] == "secret":  # not shown
            lines[key] = f"{key}: {item['msg']}"
        elif item["type"] == "missing":
            lines[key] = f"{key}: missing; this key has no default"
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.setdefault(key, f"{key}={masked(item['input'])}: {message}")
    return list(lines.values())
