"""Hydra's own command line: --cfg, --info, -m sweeps, shell completion and the rest of its options."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trainer.config import recipes
from trainer.config.compose import config_of, lenient, raw_values
from trainer.config.sweep import name_of
from trainer.errors import ConfigError, OnecurveError
from trainer.topology import world_size

QUIET = ("--cfg", "-c", "--info", "-i", "--version", "--hydra-help")
COMPLETION = ("--shell-completion", "-sc")


def hydra_command(arguments: Sequence[str]) -> None:
    """Hands the arguments to Hydra. Only the main rank prints what is the same on every rank."""
    rank = int(os.environ.get("RANK", "0"))
    if rank and any(argument.split("=")[0] in QUIET for argument in arguments):
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # ours are shown in one block, others deserve their trace
    try:
        if not any(argument in COMPLETION for argument in arguments):
            arguments = [_checked_later(argument) for argument in arguments]
        with tempfile.TemporaryDirectory(prefix="onecurve-") as scratch:
            # A sweep's own file is the main rank's to write.
            sys.argv[1:] = [*arguments, f"hydra.sweep.dir={scratch}"] if rank else arguments
            recipes.install()
            _main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


@hydra.main(version_base="1.3", config_path="pkg://trainer.conf", config_name="config")
def _main(composed: DictConfig) -> None:
    """One job: of a sweep, or alone with options of Hydra's. A sweep's jobs get folders of their own."""
    from trainer.__main__ import BORN, tell
    from trainer.run import run

    raw, hydra_config = raw_values(composed), HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        raw["run"]["dir"] = str(Path(raw["run"]["dir"]) / name_of(hydra_config.overrides.task))
    try:
        run(config_of(raw, [], world_size()), BORN)
    except OnecurveError as error:  # Hydra would keep an exception and start the next job
        tell(error)
        sys.exit(error.exit_code)


def _checked_later(argument: str) -> str:
    """Values get past Hydra to our own check; sweeps, groups and options stay as they are."""
    if argument.startswith("-") or "=" not in argument or argument.startswith(("hydra.", "+", "~")):
        return argument
    return lenient(argument)
