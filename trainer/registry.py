"""The plugins: the classes behind each option of a group, imported when they are used.

Each built-in option has one row: the class of its section, which has its keys, its checks and what it can do, and
imports no torch; and the class or function that is made of the section. A user's class is named in its YAML,
`package.module:Class`, has the section's class as its `Config`, and is found by the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

from trainer.config.section import Plugin
from trainer.config.strategy import Strategy
from trainer.config.transforms import transformed
from trainer.config.words import nearest_hint
from trainer.errors import ConfigError


class Option(NamedTuple):
    section: str
    """The class of its section."""
    target: str = ""
    """What is made of the section; empty where others read its keys."""

    @property
    def config(self) -> type[Plugin]:
        return load(self.section)


OPTIONS: dict[str, dict[str, Option]] = {
    "model": {
        "gpt": Option("trainer.config.models:GPT", "trainer.models.gpt:GPT"),
        "llama": Option("trainer.config.huggingface:Llama", "trainer.models.huggingface:Llama"),
        "gpt2": Option("trainer.config.huggingface:GPT2", "trainer.models.huggingface:GPT2"),
    },
    "objective": {
        "causal_lm": Option("trainer.config.objectives:CausalLM", "trainer.objectives.causal_lm:CausalLM"),
    },
    "data": {
        "shakespeare": Option("trainer.config.data:Text"),
        "webdataset": Option("trainer.config.data:Text"),
        "samples": Option("trainer.config.data:Samples"),
    },
    "strategy": {
        "single": Option("trainer.config.strategy:Single", "trainer.strategies.single:Single"),
        "ddp": Option("trainer.config.strategy:DDP", "trainer.strategies.ddp:DDP"),
        "fsdp": Option("trainer.config.strategy:FSDP", "trainer.strategies.fsdp:FSDP"),
        "hsdp": Option("trainer.config.strategy:HSDP", "trainer.strategies.fsdp:HSDP"),
        "pipeline": Option("trainer.config.strategy:Pipeline", "trainer.strategies.pipeline:Pipeline"),
        "zero": Option("trainer.config.strategy:Zero", "trainer.strategies.zero:Zero"),
    },
    "precision": dict.fromkeys(("auto", "fp32", "bf16", "fp16", "fp8"), Option("trainer.config.strategy:Precision")),
    "optimizer": {
        "adamw": Option("trainer.config.optim:AdamW", "trainer.optim.adamw:adamw"),
        "lion": Option("trainer.config.optim:Lion", "trainer.optim.lion:lion"),
        "muon": Option("trainer.config.optim:Muon", "trainer.optim.muon:muon"),
    },
    "schedule": {
        "warmup_cosine": Option("trainer.config.optim:WarmupCosine", "trainer.optim.schedule:warmup_cosine"),
        "linear": Option("trainer.config.optim:Linear", "trainer.optim.schedule:linear"),
        "constant": Option("trainer.config.optim:Constant", "trainer.optim.schedule:constant"),
        "wsd": Option("trainer.config.optim:WSD", "trainer.optim.schedule:wsd"),
    },
    "launch": {
        "local": Option("trainer.config.launch:Local"),
        "slurm": Option("trainer.config.launch:Slurm"),
    },
}

# Groups that accept users' classes, and the base class of their Config.
BASES: dict[str, type[Plugin]] = {
    "model": Plugin, "objective": Plugin, "strategy": Strategy, "optimizer": Plugin, "schedule": Plugin,
}  # fmt: skip
# The transforms that `model.transforms` names, in any number; users' classes are named there, too.
TRANSFORMS: dict[str, Option] = {
    "freeze": Option("trainer.config.transforms:Freeze", "trainer.transforms.freeze:Freeze"),
    "lora": Option("trainer.config.transforms:LoRA", "trainer.transforms.lora:LoRA"),
}
INSTEAD = {"data": "; functions of yours change its samples by data.maps"}


def load(target: str) -> Any:
    """Returns the object that `package.module:name` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def config_class(group: str, name: str, plugins: Sequence[str], section: str = "") -> type[Plugin]:
    """Returns the section's class of option `name` of a group: a built-in one, or the `Config` of a user's class.
    `section`: the section that chooses it, if it is not the group's own."""
    key, options = f"{section or group}.name", OPTIONS[group]
    if name in options:
        return options[name].config
    if ":" not in name:
        raise ConfigError(f"{key}={name}: no such option{nearest_hint(name, options)}")
    if group not in BASES:
        raise ConfigError(f"{key}={name}: should be one of {', '.join(options)}{INSTEAD.get(group, '')}")
    config = _config_of_users(key, name, plugins, BASES[group])
    return transformed(name, config) if group == "model" else config


def transform_class(key: str, name: str, plugins: Sequence[str]) -> type[Plugin]:
    """Returns the class of a transform's section `key`: a built-in one, or the `Config` of a user's class."""
    if ":" in name:
        return _config_of_users(f"{key}.name", name, plugins, Plugin)
    if name not in TRANSFORMS:
        advice = "; one of yours has a key name=package.module:Class"
        raise ConfigError(f"{key}: no such transform{nearest_hint(name, TRANSFORMS)}{advice}")
    return TRANSFORMS[name].config


def _config_of_users(key: str, name: str, plugins: Sequence[str], base: type[Plugin]) -> type[Plugin]:
    config = getattr(import_named(key, name, plugins), "Config", None)
    if not (isinstance(config, type) and issubclass(config, base)):
        requirement = f"a subclass of onecurve.{base.__name__}"
        raise ConfigError(f"{key}={name}: needs a class attribute `Config`, {requirement}")
    reserved_names = {name for kind in base.__mro__ if kind.__module__.startswith("trainer.") for name in vars(kind)}
    if reserved := sorted(reserved_names & config.model_fields.keys() - base.model_fields.keys()):
        raise ConfigError(f"{key}={name}: its key {', '.join(reserved)} is a method of every section; rename it")
    return config


def plugin(config: Any, group: str) -> Any:
    """Returns the class or function behind the option of a group of a checked config, built in or the user's."""
    name = getattr(config, group).name
    if name in OPTIONS[group]:
        return load(OPTIONS[group][name].target)
    return import_named(f"{group}.name", name, config.run.plugins)


def import_named(key: str, target: str, plugins: Sequence[str]) -> Any:
    """Returns the object that `package.module:name` names, if its package is on the user's list `run.plugins`."""
    package = target.partition(":")[0].partition(".")[0]
    if package not in plugins:
        way = f"add run.plugins=[{package}] (--plugins {package} to sample, evaluate, replay and export)"
        raise ConfigError(f"{key}={target}: package '{package}' is not allowed; if you trust it, {way}")
    try:
        return load(target)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{key}={target}: cannot be imported: {type(error).__name__}: {error}") from error


def missing(sections: Mapping[str, Any]) -> list[str]:
    """Returns what the chosen plugins need and this machine does not have, as problems of the config, by the function
    `missing` of their modules."""
    problems = []
    for group, section in sections.items():
        option = OPTIONS.get(group, {}).get(getattr(section, "name", ""))
        if option is None or not option.target:
            continue  # a user's class reports that when it is made
        module = import_module(option.target.partition(":")[0])
        if (says := getattr(module, "missing", None)) and (problem := says(section)):
            problems.append(problem)
    return problems


def import_all() -> None:
    """Imports all built-in plugins whose packages are installed, for a process that forks others."""
    for options in [*OPTIONS.values(), TRANSFORMS]:
        for option in options.values():
            with suppress(ImportError):
                import_module((option.target or option.section).partition(":")[0])
