"""Hydra's sweep grammar: turns a command line with sweeps into the command lines of its jobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from trainer.config.compose import in_hydra, parse_leniently, quote
from trainer.errors import ConfigError
from trainer.secrets import shown_override


def name_of(overrides: Sequence[str]) -> str:
    """Returns the name of a job's folder below `run.dir`, made of its overrides: another sweep must not continue these
    runs with other values. Keys of `launch` and secrets do not count."""
    bare = (shown_override(text).lstrip("+") for text in overrides)
    name = ",".join(sorted(text for text in bare if not re.match(r"launch[.=]", text)))
    name = re.sub(r"[^A-Za-z0-9=.,+-]", "_", name) or "0"
    return name if len(name) <= 150 else f"{name[:130]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Returns the parsed overrides, and the problems of the others. Sweeps over groups (`glob`) need `in_hydra`."""
    parser, parsed, problems = OverridesParser.create(GlobalHydra.instance().config_loader()), [], []
    for text in overrides:
        try:
            argument = text if _parses(text, parser) else quote(text, parser) or text
            parsed += parser.parse_overrides([parse_leniently(argument)])
        except HydraException:
            reason = "is not an override; write key=value, and a sweep as key=1,2 or key=range(1,4)"
            problems.append(f"{shown_override(text)}: {reason}")
    return parsed, problems


def jobs(overrides: Sequence[str]) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns the swept keys, the overrides of each job, in Hydra's order, and the problems of the overrides.

    Raises ConfigError if a sweep has no values.
    """
    with in_hydra():
        parsed, problems = parse(overrides)
        continuous = [
            override for override in parsed if override.is_sweep_override() and not override.is_discrete_sweep()
        ]
        endless = "an interval has no end of values: give --trials N"
        problems += [f"{str(override.input_line).lstrip('+')}: {endless}" for override in continuous]
        parsed = [override for override in parsed if override not in continuous]
        try:
            (job_overrides,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        except (HydraException, ValueError, TypeError) as error:
            raise ConfigError(" ".join(str(error).split())) from error
    return [key_of(override) for override in parsed if override.is_sweep_override()], job_overrides, problems


def key_of(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def values_of(job: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Returns the values that the overrides of a job set the swept keys to."""
    values = dict(text.lstrip("+").partition("=")[::2] for text in job)
    return {key: values[key] for key in keys}


def plain_of(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that are not swept."""
    with in_hydra():
        return [str(override.input_line) for override in parse(overrides)[0] if not override.is_sweep_override()]


def _parses(text: str, parser: OverridesParser) -> bool:
    try:
        parser.parse_overrides([text])
    except OverrideParseException:
        return False
    return True
