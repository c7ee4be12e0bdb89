"""`onecurve checkpoint restore RUN_DIR [STEP]`: brings back whole checkpoints that were set aside as damaged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.checkpoint_names import checkpoints_folder, hold_run_lock, printable, raise_as_config_error, step_of
from trainer.errors import ConfigError, TrainingError


def add_command(commands: Any) -> None:
    about = """Brings back checkpoints that a run has set aside (`.damaged-step-...`): those of which every byte is what
    was written. The others stay where they are, and make the exit code 4. Refused while a run trains in the folder.
    The run goes on from its newest checkpoint, so also from a restored one."""
    parser = commands.add_parser("restore", help="bring back set-aside checkpoints that verify", description=about)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("step", type=int, nargs="?", metavar="STEP", help="only the checkpoint of this step")
    parser.set_defaults(func=restore)


def restore(arguments: argparse.Namespace) -> int:
    """Prints a line for each checkpoint that was set aside; returns exit code 4 if one of them is damaged."""
    run_dir, code = arguments.run_dir, 0
    with raise_as_config_error("RUN_DIR", run_dir), hold_run_lock(run_dir):
        for path in _list_set_aside(run_dir, arguments.step):
            message, damaged = _restore(path)
            print(f"{path.name}: {message}", flush=True)
            code = TrainingError.exit_code if damaged else code
    return code


def _list_set_aside(run_dir: Path, step: int | None) -> list[Path]:
    """Returns the checkpoints that were set aside, or those of `step`. Raises ConfigError where there is none."""
    from trainer.checkpoint.retention import damaged_in

    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"RUN_DIR {run_dir}: has no checkpoints/ in it: name the folder of a run")
    folders = damaged_in(folder)
    if matches := [path for path in folders if step in (None, step_of(path))]:
        return matches
    steps = ", ".join(sorted({str(step_of(path)) for path in folders}, key=int))
    if step is None:
        raise ConfigError(f"RUN_DIR {run_dir}: no checkpoint was set aside")
    raise ConfigError(f"STEP {step}: no checkpoint of this step was set aside; there are: {steps or 'none'}")


def _restore(path: Path) -> tuple[str, bool]:
    """Restores a checkpoint if it is whole; returns what became of it, and whether it is damaged."""
    from trainer.checkpoint import format
    from trainer.files import move_folder

    final = path.with_name(format.folder_name(step_of(path)))
    try:
        manifest = format.verify(path)
        if manifest.get("step") != step_of(path):
            raise format.DamagedCheckpoint(f"it is of step {manifest.get('step')}")
    except (format.DamagedCheckpoint, TrainingError) as damage:
        return f"damaged, stays set aside: {printable(damage)}", True
    if final.exists():
        return f"whole, but {final.name} is there already: stays set aside", False
    move_folder(path, final)
    return f"whole (every byte checked), counts again as {final.name}", False
