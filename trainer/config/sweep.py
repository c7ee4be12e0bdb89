"""Hydra's sweep grammar: from a command line with sweeps to the command lines of its jobs."""

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
    """Of the folder of a sweep's job, below `run.dir`, by all that it overrides: another sweep must not go on with
    these runs under other values. How they are launched does not matter, nor a secret in them."""
    bare = (shown_override(text).lstrip("+") for text in overrides)
    name = ",".join(sorted(text for text in bare if not re.match(r"launch[.=]", text)))
    name = re.sub(r"[^A-Za-z0-9=.,+-]", "_", name) or "0"
    return name if len(name) <= 150 else f"{name[:130]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """And what is wrong with the others. Sweeps over groups (`glob`) need `in_hydra`."""
    parser, parsed, problems = OverridesParser.create(GlobalHydra.instance().config_loader()), [], []
    for text in overrides:
        try:
            given = text if _parses(text, parser) else quote(text, parser) or text
            parsed += parser.parse_overrides([parse_leniently(given)])
        except HydraException:
            what = "is not an override; write key=value, and a sweep as key=1,2 or key=range(1,4)"
            problems.append(f"{shown_override(text)}: {what}")
    return parsed, problems


def jobs(overrides: Sequence[str]) -> tuple[list[str], list[list[str]], list[str]]:
    """The keys that are swept, the overrides of each job, in Hydra's order, and what is wrong with the overrides.

    Raises ConfigError: a sweep gives nothing.
    """
    with in_hydra():
        parsed, problems = parse(overrides)
        continuous = [one for one in parsed if one.is_sweep_override() and not one.is_discrete_sweep()]
        endless = "an interval has no end of values: give --trials N"
        problems += [f"{str(one.input_line).lstrip('+')}: {endless}" for one in continuous]
        parsed = [one for one in parsed if one not in continuous]
        try:
            (found,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        except (HydraException, ValueError, TypeError) as error:
            raise ConfigError(" ".join(str(error).split())) from error
    return [key_of(one) for one in parsed if one.is_sweep_override()], found, problems


def key_of(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def values_of(job: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """What the overrides of a job give the swept keys."""
    given = dict(text.lstrip("+").partition("=")[::2] for text in job)
    return {key: given[key] for key in keys}


def plain_of(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that are not swept."""
    with in_hydra():
        return [str(one.input_line) for one in parse(overrides)[0] if not one.is_sweep_override()]


def _parses(text: str, parser: OverridesParser) -> bool:
    try:
        parser.parse_overrides([text])
    except OverrideParseException:
        return False
    return True
