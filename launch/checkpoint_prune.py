"""`onecurve checkpoint prune RUN_DIR`: deletes checkpoints as a run would, by the same rules."""

from __future__ import annotations

import argparse
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.checkpoint_names import (
    checkpoints_folder,
    hold_run_lock,
    list_checkpoints,
    printable,
    raise_as_config_error,
)
from launch.sizes import size
from trainer.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from trainer.checkpoint.retention import Retention


def add_command(commands: Any) -> None:
    about = """Deletes checkpoints as a run with these settings would, once the newest has been verified, and what
    interrupted saves left. What is not given here is as the newest checkpoint's config says. Refused while a
    run trains in the folder."""
    parser = commands.add_parser(
        "prune", help="delete checkpoints by the rules of `checkpoint.keep`", description=about
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--keep", type=int, metavar="N", help="the newest N stay (checkpoint.keep)")
    parser.add_argument("--every", type=int, metavar="N", help="multiples of N stay (checkpoint.keep_every); 0: none")
    parser.add_argument("--best", metavar="METRIC", help="the one with the lowest METRIC stays (checkpoint.keep_best)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go; also while the run trains")
    parser.set_defaults(func=prune)


def prune(arguments: argparse.Namespace) -> int:
    """Deletes the checkpoints that the rules do not keep, or with --dry-run only lists them."""
    from trainer.checkpoint import format
    from trainer.checkpoint.inspection import disk_usage
    from trainer.checkpoint.retention import clear_leftovers, remove

    run_dir, dry = arguments.run_dir, arguments.dry_run
    folder = checkpoints_folder(run_dir)
    with raise_as_config_error("RUN_DIR", run_dir), nullcontext() if dry else hold_run_lock(run_dir):
        paths = list_checkpoints(run_dir)
        try:
            retention = _retention(arguments, format.read_manifest(paths[-1]))
            format.verify(paths[-1])  # its sizes are not enough: what goes is needed if this one is not whole
        except format.DamagedCheckpoint as damage:
            raise TrainingError(f"{paths[-1]}: {damage}; the older ones are needed, nothing is deleted") from None
        before, freed = disk_usage(folder), 0
        removable = retention.removable(folder)
        for path in removable:
            freed += (nbytes := disk_usage(path))
            if not dry:
                remove(path, f"prune-{uuid.uuid4().hex[:8]}")
            print(f"{'would delete' if dry else 'deleted'} {path.name}  {size(nbytes)}", flush=True)
        if not dry:
            clear_leftovers(folder)
            freed = before - disk_usage(folder)
    stay = len(paths) - len(removable)
    print(f"{stay} of {len(paths)} stay ({_rules(retention)}); {'would free' if dry else 'freed'} {size(freed)}")
    return 0


def _retention(arguments: argparse.Namespace, manifest: dict[str, Any]) -> Retention:
    """Returns what to keep, by the arguments and else by the run's own config. Raises ConfigError."""
    from trainer.checkpoint.inspection import flatten, inspect_checkpoint
    from trainer.checkpoint.retention import Retention

    config = flatten(manifest.get("config"))
    keep, every, best = (
        config.get(f"checkpoint.{key}") if value is None else value
        for key, value in (("keep", arguments.keep), ("keep_every", arguments.every), ("keep_best", arguments.best))
    )
    if type(keep) is not int or keep < 1:
        raise ConfigError(f"--keep: must be a number of at least 1, not {keep}")
    if every is not None and (type(every) is not int or every < 0):
        raise ConfigError(f"--every: must be a number of steps, or 0 for none, not {every}")
    if arguments.best:  # under a wrong name the best one would go
        metrics = {
            name
            for path in list_checkpoints(arguments.run_dir)
            if (info := inspect_checkpoint(path))
            for name in info.evaluation
        }
        if best not in metrics:
            names = ", ".join(sorted(metrics)) or "nothing"
            raise ConfigError(f"--best {best}: no checkpoint was evaluated by it; choose among: {names}")
    return Retention(keep, every or None, best or None)


def _rules(retention: Retention) -> str:
    every = f", multiples of {retention.every}" if retention.every else ""
    best = f", the lowest {printable(retention.best)}" if retention.best else ""
    return f"the newest {retention.keep}{every}{best}"
