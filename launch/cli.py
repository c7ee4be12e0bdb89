"""`onecurve`: the command line. Each subcommand lives in a module of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import trainer
from launch import checkpoint, data, evaluate, export, jobs, plan, recipes, replay, report, sample, submit, sweep, train
from launch.doctor import command as doctor
from onecurve.paths import put_working_folder_last
from trainer.__main__ import print_error
from trainer.errors import OnecurveError
from trainer.processes import make_printing_safe
from trainer.secrets import hide_arguments


def main() -> None:
    """Parses the command line, runs the command and exits with the command's exit code."""
    make_printing_safe()
    arguments = parse(sys.argv[1:])
    hide_arguments()
    put_working_folder_last()  # where packages of the user's are
    try:
        code = arguments.func(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OnecurveError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line, with the command itself as `func`. Exits with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog="onecurve", description=trainer.__doc__)
    parser.add_argument("--version", action="version", version=f"onecurve {trainer.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (
        train,
        recipes,
        submit,
        sweep,
        jobs,
        plan,
        doctor,
        sample,
        report,
        evaluate,
        replay,
        export,
        checkpoint,
        data,
    ):
        module.add_commands(commands)
    arguments, extra = parser.parse_known_args(words)
    if extra and not (isinstance(getattr(arguments, "overrides", None), list) and all(map(_is_override, extra))):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:  # overrides behind an option: argparse takes them only where the first of them is
        arguments.overrides += extra
    return arguments


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


if __name__ == "__main__":
    main()
