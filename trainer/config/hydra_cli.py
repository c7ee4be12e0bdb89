"""Hydra's own command line: --cfg, --info, -m sweeps, shell completion and the rest of its options."""

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


def hydra_command(arguments: Sequence[str], born: float, tell: Callable[[Exception], None]) -> None:
    """Hands the arguments to Hydra. Only the main rank prints what is the same on every rank. `born`: the process's
    `time.monotonic()`; `tell` prints why a job of a sweep ended the command."""
    rank = int(os.environ.get("RANK", "0"))
    is_quiet = any(argument.split("=")[0] in QUIET for argument in arguments)
    if rank and is_quiet:
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # ours are shown in one block, others deserve their trace
    try:
        if not any(argument in COMPLETION for argument in arguments):
            arguments = [_checked_later(argument) for argument in arguments]
        with tempfile.TemporaryDirectory(prefix="onecurve-") as scratch, _without_secrets(is_quiet):
            # A sweep's own file is the main rank's to write.
            sys.argv[1:] = [*arguments, f"hydra.sweep.dir={scratch}"] if rank else arguments
            recipes.install()

            @hydra.main(version_base="1.3", config_path="pkg://trainer.conf", config_name="config")
            def job(composed: DictConfig) -> None:
                try:
                    _run(composed, born)
                except OnecurveError as error:  # Hydra would keep an exception and start the next job
                    tell(error)
                    sys.exit(error.exit_code)

            job()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _run(composed: DictConfig, born: float) -> None:
    """One job: of a sweep, or alone with options of Hydra's. A sweep's jobs get folders of their own."""
    from trainer.run import run

    hide_arguments()  # Hydra has read them
    raw, hydra_config = raw_values(composed), HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        name = name_of(hydra_config.overrides.task)
        raw["run"]["dir"] = str(Path(raw["run"]["dir"]) / name)
        with suppress(KeyError, TypeError, AttributeError):  # the check names what is wrong
            wandb = raw["track"]["wandb"]
            wandb |= {"group": wandb.get("group") or raw["run"]["name"], "name": wandb.get("name") or name[:128]}
    run(config_of(raw, [], world_size()), born)


@contextmanager
def _without_secrets(is_quiet: bool) -> Iterator[None]:
    """Masks what Hydra prints of a config, and writes of a sweep. It prints values of single keys, too (`--package`):
    of a command that trains nothing (`is_quiet`) every line is looked at."""
    to_yaml, printed = OmegaConf.to_yaml, io.StringIO()

    def hidden(config: Any, *, resolve: bool = False, sort_keys: bool = False) -> str:
        return to_yaml(
            OmegaConf.create(masked(OmegaConf.to_container(config, resolve=resolve), _shown_text)), sort_keys=sort_keys
        )

    with patch.object(OmegaConf, "to_yaml", staticmethod(hidden)):
        if not is_quiet:
            yield
            return
        try:
            with redirect_stdout(printed):
                yield
        finally:
            sys.stdout.write("".join(map(_shown_text, printed.getvalue().splitlines(keepends=True))))


def _shown_text(text: str) -> str:
    """An override that is listed, or any other value."""
    return shown_override(text) if re.match(r"[+~]*[\w./@-]+=", text) else masked(text)


def _checked_later(argument: str) -> str:
    """Values get past Hydra to our own check; sweeps, groups and options stay as they are."""
    if argument.startswith("-") or "=" not in argument or argument.startswith(("hydra.", "+", "~")):
        return argument
    return parse_leniently(argument)
