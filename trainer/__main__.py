"""`python -m trainer [overrides]`, alone or under torchrun: one process of a run."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    import onecurve.paths

    onecurve.paths.put_working_folder_last()

import os
import sys
import time
import traceback
from collections.abc import Sequence

from onecurve.paths import put_working_folder_last
from trainer.processes import die_with_parent, make_printing_safe
from trainer.secrets import hide_arguments, prose, shown_override

BORN = time.monotonic()


def main() -> None:
    """Runs one rank, and exits with its documented exit code."""
    put_working_folder_last()
    make_printing_safe()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed torchrun would leave this process behind
        die_with_parent()
    arguments = sys.argv[1:]
    hide_arguments()
    sys.exit(guarded(arguments, BORN))


def guarded(arguments: Sequence[str], started_at: float) -> int:
    """Runs a command line and returns its exit code; an expected error is printed as one block of text. `started_at`
    is the `time.monotonic()` of the start."""
    from trainer.errors import OnecurveError
    from trainer.launchers import recognize

    try:
        recognize()
        command(arguments, started_at)
    except OnecurveError as error:
        print_error(error)
        if not error.recorded and (file := os.environ.get("ONECURVE_REFUSED")) and error.exit_code in (2, 3):
            with open(file, "w") as refusal:  # for a launcher that does not see the exit code behind torchrun
                refusal.write(str(error.exit_code))
        return error.exit_code
    except Exception:
        print(prose(traceback.format_exc()), end="", file=sys.stderr)
        return 4
    return 0


def command(arguments: Sequence[str], started_at: float) -> None:
    """Trains with plain overrides (and `--config-dir`), or with `--config` and a config that a launcher has composed;
    any other option goes to Hydra's command line."""
    from trainer.config.compose import load, load_composed
    from trainer.topology import world_size

    config_dir, overrides = _split_option(arguments, "--config-dir", "-cd")
    composed, extra = _split_option(arguments, "--config")
    if composed is not None:
        from trainer.errors import ConfigError
        from trainer.run import run

        if extra:
            raise ConfigError(
                f"--config {composed}: is a whole config; leave out {' '.join(map(shown_override, extra))}"
            )
        run(load_composed(composed, world_size()), started_at)
    elif any(argument in ("--help", "-h") for argument in overrides):
        from trainer.config.reference import help_text

        print(help_text())
    elif any(argument.startswith("-") for argument in overrides):
        from trainer.config.hydra_cli import hydra_command

        hydra_command(arguments, started_at, print_error)
    else:
        from trainer.run import run

        run(load(overrides, world_size(), config_dir), started_at)


def print_error(error: Exception) -> None:
    """Prints an error as one block on stderr. A problem of the config is the same on every rank, so only the main one
    prints it, where there is sure to be one."""
    from trainer.errors import ConfigError, Interrupted, PeerLost
    from trainer.launchers import are_by_hand

    if getattr(error, "recorded", False) and "ONECURVE_LIFE" in os.environ:
        return
    rank, is_alone = int(os.environ.get("RANK", "0")), "RANK" not in os.environ
    if isinstance(error, ConfigError):
        if rank == 0 or are_by_hand() or (error.local and os.environ.get("LOCAL_RANK") == "0"):
            count, speaker = len(error.problems), f"rank {rank}: " if rank else ""
            print(f"\nonecurve: {speaker}{count} problem{'s' * (count > 1)}, nothing was started:", file=sys.stderr)
            print(*(f"  {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
    elif not isinstance(error, PeerLost) and (rank == 0 or not isinstance(error, Interrupted)):
        where = "" if is_alone or isinstance(error, Interrupted) else f"rank {rank}: "
        print(f"\nonecurve: {where}{error}", file=sys.stderr)


def _split_option(arguments: Sequence[str], *names: str) -> tuple[str | None, list[str]]:
    """Splits off the value of an option (`--name VALUE`, `--name=VALUE`) from the other arguments."""
    remaining, option_value, expects_value = [], None, False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if expects_value:
            option_value, expects_value = argument, False
        elif name in names:
            option_value, expects_value = value or option_value, not equals
        else:
            remaining.append(argument)
    return option_value, remaining


if __name__ == "__main__":
    main()
