"""`onecurve report RUN_DIR`: a run in a few numbers on the terminal, and in full as report.html."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from trainer.tracking.goodput import Goodput


def add_commands(subparsers: Any) -> None:
    """Registers the command `report`."""
    parser = subparsers.add_parser(
        "report", help="write report.html of a run or sweep.html of a sweep, print a summary"
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.set_defaults(func=report)


def report(arguments: argparse.Namespace) -> int:
    """Prints the summary and the report's path.

    Raises:
        ConfigError: RUN_DIR is not a run's folder, or a file in it is damaged.
    """
    from launch.liveness import dead_since, describe_death
    from launch.sweep import is_sweep

    if is_sweep(arguments.run_dir):
        from launch.sweeps.summary import show

        return show(arguments.run_dir)
    from trainer.tracking.report import write_report
    from trainer.tracking.summary import headline, load

    run = load(arguments.run_dir)
    if (since := dead_since(arguments.run_dir)) is not None:
        run = replace(run, status={**run.status, "state": "dead", "reason": describe_death(since)})
    path = write_report(arguments.run_dir, run)
    table = Table(show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column(style="bold", justify="right")
    table.add_column(style="dim")
    for figure in headline(run):
        table.add_row(*figure)
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(f"{run.name}: {run.status['state']}", style="bold")
    if run.status["state"] == "dead":
        console.print(run.status["reason"], soft_wrap=True)
    console.print(table)
    if run.time:
        _print_time(console, run.time)
    console.print(str(path), soft_wrap=True)
    return 0


def _print_time(console: Console, goodput: Goodput) -> None:
    """Prints where the time went."""
    table = Table(show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column(style="bold", justify="right")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for _, name, time, share in goodput.table:
        table.add_row(name, time, f"{share:.1%}", "▇" * round(share * 40))
    console.print("\nwhere the time went", style="bold")
    console.print(table)
    console.print(f"{goodput.sentence}\n", soft_wrap=True)
