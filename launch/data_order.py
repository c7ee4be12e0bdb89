"""`onecurve data order --steps A:B [overrides]`: which samples the steps of a run take, before any is read."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from trainer.errors import ConfigError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "order", help="which samples come when: the ledger of steps that need not have happened"
    )
    parser.add_argument("--steps", required=True, metavar="A:B", help="from step A to step B, both included")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="those of the run")
    parser.set_defaults(func=order)


def order(arguments: argparse.Namespace) -> int:
    """Prints the rows that `ledger.jsonl` has or will have for these steps."""
    steps = re.fullmatch(r"(\d+):(\d+)", arguments.steps)
    if not steps or not 1 <= int(steps[1]) <= int(steps[2]):
        raise ConfigError(f"--steps={arguments.steps}: two step numbers, such as 1:10, the first from 1 on")
    from trainer.config.compose import load

    config = load(arguments.overrides, config_dir=arguments.config_dir)
    from trainer.run_data import open_run_data, open_shards  # late: it imports torch
    from trainer.topology import ALONE

    share = open_run_data(config, ALONE, open_shards(config, ALONE)).stream.share
    for step in range(int(steps[1]), int(steps[2]) + 1):
        entries = [share.parts[part].source.entry(unit) for _, part, unit in share.example_ids(step - 1)]
        print(json.dumps({"step": step, "samples": entries}))
    return 0
