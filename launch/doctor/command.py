"""`onecurve doctor`: examines this machine, or all nodes of the job that it is started in, and prints one table."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.doctor.examination import Options, print_report
from trainer.errors import ConfigError
from trainer.launchers import recognize

LIMIT_S, QUICK_LIMIT_S = 90.0, 45.0
ABOUT = """Checks versions, devices, limits, clocks, bandwidth, the folder of runs and what else is installed. Plainly
started it examines this machine with a few processes; in a Slurm job of several nodes, all of them; under torchrun,
`python -m launch.doctor` examines all nodes of it. Exit code 0 if nothing is bad, 4 if something is; then a line
`bad nodes: a,b` names the nodes to leave out."""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="what this machine or job can do, and what is wrong", description=ABOUT)
    add_arguments(parser)
    parser.set_defaults(func=doctor)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--procs", type=int, help="processes on this machine (default: one a GPU, else 2)")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where runs are written (default: runs)")
    parser.add_argument("--quick", action="store_true", help="in a few seconds, before each job: small messages only")
    limit = f"seconds that nothing is waited for longer (default: {LIMIT_S:.0f}, quick: {QUICK_LIMIT_S:.0f})"
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=limit)
    parser.add_argument("--json", action="store_true", help="one line of JSON for machines")
    parser.add_argument("--member", help=argparse.SUPPRESS)


def doctor(arguments: argparse.Namespace) -> int:
    """Examines this machine, or all nodes of the job. Returns exit code 4 if something is bad."""
    limit = arguments.limit or (QUICK_LIMIT_S if arguments.quick else LIMIT_S)
    if limit < 3:
        raise ConfigError(f"--limit {limit:g}: at least 3 seconds")
    if arguments.procs is not None and arguments.procs < 1:
        raise ConfigError(f"-n {arguments.procs}: at least one process is needed")
    options = Options(arguments.dir.expanduser().absolute(), arguments.quick, limit, arguments.json)
    if arguments.member:
        from launch.doctor.worker import run_worker

        number, ranks, processes, alone = map(int, arguments.member.split(","))
        return run_worker(options, ranks, processes, bool(alone), number)
    recognize()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from launch.doctor.ranks import rank

        return rank(options)
    from launch.doctor import gpus, machine, slurm, workers

    if nodes := slurm.nodes() if arguments.procs is None else []:
        return print_report(workers.on_all_nodes(options, nodes), options)
    procs = arguments.procs or len(gpus.visible()) or 2
    return print_report(workers.on_this_machine(options, procs, machine.node_name()), options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m launch.doctor`, as a rank of torchrun or on its own."""
    from trainer.__main__ import print_error

    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description=ABOUT)
    add_arguments(parser)
    try:
        return doctor(parser.parse_args(arguments))
    except ConfigError as error:
        print_error(error)
        return error.exit_code
