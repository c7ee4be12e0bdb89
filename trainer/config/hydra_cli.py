"""Runs Hydra's own command line: --cfg, --info, -m sweeps, shell completion and its other options."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import recipes
from trainer.config.compose import config_of, parse_leniently, raw_values
from trainer.config.sweep import name_of
from trainer.errors import ConfigError, OnecurveError
from trainer.secrets import hide_arguments, masked, shown_override
from trainer.topology import world_size

QUIET = ("--cfg", "-c", "--info", "-i", "--version", "--hydra-help")
COMPLETION = ("--shell-completion", "-sc")


def hydra_command(arguments: Sequence[str], started_at: float, report_error: Callable[[Exception], None]) -> None:
    """Hands the arguments to Hydra. Only the main rank prints what is the same on every rank.

    `started_at`: `time.monotonic()` at the start of the process; `report_error` prints the error of a job of a sweep,
    which ends the command.
    """
    rank = int(os.environ.get("RANK", "0"))
    is_quiet = any(argument.split("=")[0] in QUIET for argument in arguments)
    if rank and is_quiet:
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # our errors are shown as one block, others with their trace
    try:
        if not any(argument in COMPLETION for argument in arguments):
            arguments = [_pass_leniently(argument) for argument in arguments]
        with tempfile.TemporaryDirectory(prefix="onecurve-") as scratch, _mask_secrets(is_quiet):
            # Only the main rank writes the file of a sweep.
            sys.argv[1:] = [*arguments, f"hydra.sweep.dir={scratch}"] if rank else arguments
            recipes.install()

            @hydra.main(version_base="1.3", config_path="pkg://trainer.conf", config_name="config")
            def job(composed: DictConfig) -> None:
                try:
                    _run(composed, started_at)
                except OnecurveError as error:  # Hydra would keep an exception and start the next job
                    report_error(error)
                    sys.exit(error.exit_code)

            job()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _run(composed: DictConfig, started_at: float) -> None:
    """Runs one job: one of a sweep, in a folder of its own, or a single run with options of Hydra's."""
    from trainer.run import run

    hide_arguments()  # Hydra has read them
    raw, hydra_config = raw_values(composed), HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        name = name_of(hydra_config.overrides.task)
        raw["run"]["dir"] = str(Path(raw["run"]["dir"]) / name)
        with suppress(KeyError, TypeError, AttributeError):  # the check reports it
            wandb = raw["track"]["wandb"]
            wandb |= {"group": wandb.get("group") or raw["run"]["name"], "name": wandb.get("name") or name[:128]}
    run(config_of(raw, [], world_size()), started_at)


@contextmanager
def _mask_secrets(is_quiet: bool) -> Iterator[None]:
    """Masks secrets in what Hydra prints of a config and writes of a sweep. Hydra also prints single values
    (`--package`): for a command that trains nothing (`is_quiet`), every line of output is masked."""
    to_yaml, output = OmegaConf.to_yaml, io.StringIO()

    def to_masked_yaml(config: Any, *, resolve: bool = False, sort_keys: bool = False) -> str:
        return to_yaml(
            OmegaConf.create(masked(OmegaConf.to_container(config, resolve=resolve), _mask_text)), sort_keys=sort_keys
        )

    with patch.object(OmegaConf, "to_yaml", staticmethod(to_masked_yaml)):
        if not is_quiet:
            yield
            return
        try:
            with redirect_stdout(output):
                yield
        finally:
            sys.stdout.write("".join(map(_mask_text, output.getvalue().splitlines(keepends=True))))


def _mask_text(text: str) -> str:
    """Masks an override, a value of a config, or any other line of output."""
    return shown_override(text) if re.match(r"[+~]*[\w./@-]+=", text) else masked(text)


def _pass_leniently(argument: str) -> str:
    """Lets a value get past Hydra to our own check; leaves sweeps, groups and options unchanged."""
    if argument.startswith("-") or "=" not in argument or argument.startswith(("hydra.", "+", "~")):
        return argument
    return parse_leniently(argument)
