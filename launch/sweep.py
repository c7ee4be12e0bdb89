"""`onecurve sweep [overrides with sweeps]`: many runs of one command line, one after the other or some at a time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from launch.sweeps.trials import FILE, Sweep, Trial, expand, folder_of, read
from launch.train import gpus
from trainer.config import sweep as grammar
from trainer.config.compose import load_sized
from trainer.errors import ConfigError

ABOUT = """Sweeps are written as in Hydra: key=1,2, key=choice(a,b), key=range(1,4), group=glob(*). All trials are
checked before the first one starts; each is a run with a folder of its own below run.dir. The same command again goes
on: finished trials are left as they are. With --trials Optuna chooses values, also from key=interval(1e-4,1e-2) and
key=tag(log,interval(1e-4,1e-2)). Exit code 0 if all are finished, else the worst of them."""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("sweep", help="many runs of one command line, what came of them", description=ABOUT)
    parser.add_argument("-n", "--procs", type=int, help="processes of each trial (default: as for train)")
    parser.add_argument("--parallel", type=int, default=1, metavar="K", help="trials at a time (default: 1)")
    parser.add_argument("--trials", type=int, metavar="N", help="search: N trials in all, chosen by Optuna")
    parser.add_argument("--metric", default="eval.loss", help="what the search makes small (default: eval.loss)")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see `python -m trainer --help`")
    parser.set_defaults(func=sweep)


def sweep(arguments: argparse.Namespace) -> int:
    """Runs all trials; returns exit code 0 if all are finished, else the worst of theirs."""
    overrides, config_dir = list(arguments.overrides), arguments.config_dir
    for name, least in (("procs", 1), ("parallel", 1), ("trials", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ConfigError(f"--{name} {value}: at least {least}")
    procs = arguments.procs or processes_of(overrides, config_dir)
    from launch.sweeps.run import Runner, describe_end, log_of
    from launch.sweeps.summary import show

    search = None
    if arguments.trials:
        from launch.sweeps.search import Search, save_trials

        folder = folder_of(overrides, config_dir)
        search = Search(overrides, arguments.trials, arguments.metric, procs, folder, config_dir)
        settings = {"metric": arguments.metric, "trials": arguments.trials, "journal": "study.journal"}
        definition = Sweep(folder, search.swept, procs, config_dir, [], settings)
        trials, count = save_trials(definition, search.trials()), arguments.trials
    else:
        all_trials = expand(overrides, procs, config_dir)
        definition = Sweep(folder_of(overrides, config_dir), list(all_trials[0].values), procs, config_dir, all_trials)
        trials, count = iter(all_trials), len(all_trials)
    failed_trials: list[Trial] = []

    def print_end(trial: Trial, code: int) -> None:
        if search:
            search.record(trial, code)
        if code not in (0, 75):
            failed_trials.append(trial)
        print(describe_end(trial, code, count), flush=True)

    runner = Runner(procs, arguments.parallel, config_dir, print_end)
    if not arguments.trials:
        definition.save()
    code = runner.run(trials)
    print()
    show(definition.folder)
    if failed_trials:
        print(f"\nonecurve: {len(failed_trials)} of {count} trials failed:", file=sys.stderr)
        print(*(f"  {trial.name}: {log_of(trial)}" for trial in failed_trials), sep="\n", file=sys.stderr)
    return code


def processes_of(overrides: list[str], config_dir: str | None) -> int:
    """Returns the processes of each trial, from the keys that are not swept, as `onecurve train` and `submit` do."""
    try:
        return load_sized(grammar.plain_of(overrides), None, config_dir, otherwise=gpus)[1]
    except ConfigError:  # `expand` reports it with all other problems
        return 1


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).is_file()


__all__ = ["Sweep", "Trial", "add_commands", "expand", "is_sweep", "read", "sweep"]
