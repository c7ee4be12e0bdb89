"""`onecurve evaluate RUN_DIR`: what a run's checkpoint makes of held-out data, without training."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="measure a run's checkpoint on held-out data, without training")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as data.validation=... or eval.steps=null"
    )
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--json", action="store_true", help="as one object")
    parser.add_argument("--plugins", nargs="*", default=[], help="packages of yours that the run's classes come from")
    parser.set_defaults(func=evaluate)


def evaluate(arguments: argparse.Namespace) -> int:
    from trainer.evaluate import evaluate_run

    def report(batches: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{batches} batches", end="", file=sys.stderr, flush=True)

    overrides = [*arguments.overrides, *(word for word in arguments.plugins if "=" in word)]  # behind --plugins
    plugins = [word for word in arguments.plugins if "=" not in word]
    step, metrics = evaluate_run(arguments.run_dir, overrides, plugins=plugins, step=arguments.step, report=report)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"step": step, **metrics}))
        return 0
    print(f"step {step}: {'  '.join(f'{name} {value:.6g}' for name, value in metrics.items())}")
    return 0
