"""The built-in plugins: what stands behind each option of a group, imported when it is used.

A user's own is named in its YAML, `package.module:Class`, and found by the same function.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from trainer.config import Config
from trainer.config.check import import_plugin
from trainer.errors import ConfigError

BUILT_IN: dict[str, dict[str, str]] = {
    "model": {
        "gpt": "trainer.models.gpt:GPT",
        "llama": "trainer.models.huggingface:Llama",
        "gpt2": "trainer.models.huggingface:GPT2",
    },
    "objective": {"causal_lm": "trainer.objectives.causal_lm:CausalLM"},
    "strategy": {
        "single": "trainer.strategies.single:Single",
        "ddp": "trainer.strategies.ddp:DDP",
        "fsdp": "trainer.strategies.fsdp:FSDP",
        "hsdp": "trainer.strategies.fsdp:HSDP",
        "pipeline": "trainer.strategies.pipeline:Pipeline",
        "zero": "trainer.strategies.zero:Zero",
    },
    "optimizer": {
        "adamw": "trainer.optim.adamw:adamw",
        "lion": "trainer.optim.lion:lion",
        "muon": "trainer.optim.muon:muon",
    },
    "schedule": {
        "warmup_cosine": "trainer.optim.schedule:warmup_cosine",
        "linear": "trainer.optim.schedule:linear",
        "constant": "trainer.optim.schedule:constant",
        "wsd": "trainer.optim.schedule:wsd",
    },
}


TRANSFORMS = {
    "freeze": "trainer.transforms.freeze:Freeze",
    "lora": "trainer.transforms.lora:LoRA",
}


def transforms(config: Config) -> list[Any]:
    """Returns the transforms of the run's model, in their order."""
    from trainer.transforms import Transform  # late: it brings torch

    made = []
    for label, section in config.model.transforms.items():
        if section.name in TRANSFORMS:
            module, _, attribute = TRANSFORMS[section.name].partition(":")
            kind = getattr(import_module(module), attribute)
        else:
            kind = import_plugin(key := f"model.transforms.{label}.name", section.name, config.run.plugins)
            if not (isinstance(kind, type) and issubclass(kind, Transform)):
                raise ConfigError(f"{key}={section.name}: should be a subclass of onecurve.Transform")
            if kind.apply is Transform.apply:
                raise ConfigError(f"{key}={section.name}: has no method `apply(model)` of its own")
        made.append(kind(section))
    return made


def plugin(config: Config, group: str) -> Any:
    """Returns the class or function behind the option of a group, built in or the user's."""
    name = getattr(config, group).name
    if name not in BUILT_IN[group]:
        return import_plugin(f"{group}.name", name, config.run.plugins)
    module, _, attribute = BUILT_IN[group][name].partition(":")
    return getattr(import_module(module), attribute)


def missing(config: Config) -> list[str]:
    """Returns what the chosen plugins need and this machine does not have, as problems of the config: their modules'
    `missing` says so."""
    problems = []
    for group, options in BUILT_IN.items():
        if (name := getattr(config, group).name) not in options:
            continue  # a user's own says so when it is made
        module = import_module(options[name].partition(":")[0])
        if (says := getattr(module, "missing", None)) and (problem := says(getattr(config, group))):
            problems.append(problem)
    return problems


def import_all() -> None:
    """Imports all that is built in, as far as what it needs is installed: for a process that forks others."""
    for options in BUILT_IN.values():
        for target in options.values():
            with suppress(ImportError):
                import_module(target.partition(":")[0])
