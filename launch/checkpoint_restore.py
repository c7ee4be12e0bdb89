"""`onecurve checkpoint restore RUN_DIR [STEP]`: what was set aside as damaged and is whole counts again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.checkpoint_names import checkpoints, nobody_trains, readable, shown, step_in
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
    """Prints a line for each that was set aside. Exit code 4 if one of them is damaged."""
    run_dir, code = arguments.run_dir, 0
    with readable("RUN_DIR", run_dir), nobody_trains(run_dir):
        for path in _set_aside(run_dir, arguments.step):
            told, damaged = _restored(path)
            print(f"{path.name}: {told}", flush=True)
            code = TrainingError.exit_code if damaged else code
    return code


def _set_aside(run_dir: Path, step: int | None) -> list[Path]:
    """Raises ConfigError where there is none."""
    from trainer.checkpoint.retention import damaged_in

    folder = checkpoints(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"RUN_DIR {run_dir}: has no checkpoints/ in it: name the folder of a run")
    found = damaged_in(folder)
    if wanted := [path for path in found if step in (None, step_in(path))]:
        return wanted
    there = ", ".join(sorted({str(step_in(path)) for path in found}, key=int))
    if step is None:
        raise ConfigError(f"RUN_DIR {run_dir}: no checkpoint was set aside")
    raise ConfigError(f"STEP {step}: no checkpoint of this step was set aside; there are: {there or 'none'}")


def _restored(path: Path) -> tuple[str, bool]:
    """What became of a checkpoint that was set aside, and whether it is damaged."""
    from trainer.checkpoint import format
    from trainer.files import move_folder

    final = path.with_name(format.folder_name(step_in(path)))
    try:
        manifest = format.verify(path)
        if manifest.get("step") != step_in(path):
            raise format.DamagedCheckpoint(f"it is of step {manifest.get('step')}")
    except (format.DamagedCheckpoint, TrainingError) as damage:
        return f"damaged, stays set aside: {shown(damage)}", True
    if final.exists():
        return f"whole, but {final.name} is there already: stays set aside", False
    move_folder(path, final)
    return f"whole (every byte checked), counts again as {final.name}", False
