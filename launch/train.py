"""`onecurve train -n PROCS [overrides]`: checks first, then starts the ranks and restarts them when one dies."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from launch.plan import batch
from trainer import locks
from trainer.config import Config
from trainer.config.compose import load_sized, recipe_message
from trainer.errors import ConfigError
from trainer.secrets import MASK, shown_command
from trainer.tracking.jsonl import read_status


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("train", help="train on this machine", prefix_chars="-")
    parser.add_argument("-n", "--procs", type=int, help="processes (default: launch.procs, else one a GPU, else 1)")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see `python -m trainer --help`")
    parser.set_defaults(func=train)


def train(arguments: argparse.Namespace) -> int:
    """Trains and returns the exit code: 0 finished, 2 config, 3 data, 4 failed, 75 interrupted."""
    if arguments.procs is not None and arguments.procs < 1:
        raise ConfigError(f"-n {arguments.procs}: at least one process is needed")
    config, procs = load_sized(arguments.overrides, arguments.procs, arguments.config_dir, otherwise=gpus)
    folder, launch, recipe = Path(config.run.dir).expanduser(), config.launch, recipe_message()
    if launch.command != "train":
        raise ConfigError(f"launch={launch.name}: `onecurve train` starts processes here; for Slurm: `onecurve submit`")
    from launch.supervisor import Supervisor  # late: torch, and the config's problems should show at once

    with Supervisor(config, procs) as supervisor:
        from trainer.plugin_checks import check_plugins
        from trainer.pretrained import open_pretrained
        from trainer.run_data import open_shards
        from trainer.run_directory import write_final_status
        from trainer.topology import ALONE

        check_plugins(config)
        open_pretrained(config, ALONE, open_shards(config, ALONE).tokenizer)
        if config.track.console:
            for title, text in [("recipe", recipe), *batch(config, procs), ("folder", str(folder))]:
                print(f"{title:12}{text}", flush=True)
        code, reason = supervisor.run()
    if code == 0:
        _print_next_commands(config, procs, arguments)
    elif reason and not supervisor.has_reported and read_status(folder).get("state") in (None, "running"):
        print(f"\nonecurve: {reason}", file=sys.stderr)
    if code and folder.is_dir():
        with suppress(Timeout, OSError):  # another process trains there
            lock = locks.acquire_run(folder)
            write_final_status(folder, reason or f"a process ended with code {code}", code)
            lock.release()
    return code


def gpus() -> int:
    """Returns the default number of processes on this machine: one for each GPU, or one without GPUs."""
    import torch

    return max(1, torch.cuda.device_count())


def _print_next_commands(config: Config, procs: int, arguments: argparse.Namespace) -> None:
    """Prints the next commands to try, ready to paste except for secrets."""
    from trainer.sampling import continues_text

    folder, program = Path(config.run.dir).expanduser(), Path(sys.argv[0])
    is_below_cwd = program.absolute().is_relative_to(Path.cwd())
    name = os.path.relpath(program) if is_below_cwd else "onecurve"  # .venv/bin/onecurve, say, which can be pasted
    more_steps = f"train.steps={2 * read_status(folder)['steps']}"
    words = [*(["--config-dir", arguments.config_dir] if arguments.config_dir else []), *arguments.overrides]
    words = [word for word in words if not word.startswith(("train.steps=", "run.fresh="))]
    command = shown_command([name, "train", "-n", str(procs), *words, more_steps])
    print(f"\nreport  {folder / 'report.html'}\n\nnext:")
    is_ours = config.data.name == "shakespeare"
    if continues_text(config):
        prompt = " --prompt 'JULIET:'" if is_ours else ""
        print(f"  {name} sample {shlex.quote(str(folder))}{prompt}   # more text from the model")
    print(f"  {command}   # go on: the same run, twice as long" + ("; *** are its secrets" if MASK in command else ""))
    if is_ours:
        print(f"  {name} data pack my_texts/ --out my_shards   # your own text as shards")
