"""Finds the runs and checkpoints that the arguments of `onecurve checkpoint` name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from trainer import locks
from trainer.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from trainer.checkpoint.load import FoundCheckpoint


def checkpoints_folder(run_dir: Path) -> Path:
    from trainer.run_directory import CHECKPOINTS

    return run_dir / CHECKPOINTS


def step_of(path: Path) -> int:
    """Returns the step of a checkpoint's folder, also of one that was set aside (`.damaged-step-00000100-1`)."""
    match = re.search(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def list_checkpoints(run_dir: Path, argument: str = "RUN_DIR", set_aside: bool = False) -> list[Path]:
    """Returns the folders of a run's checkpoints in rising order of steps, with `set_aside` also damaged ones.

    Raises ConfigError where there is none; OSError.
    """
    from trainer.checkpoint.retention import complete_checkpoints, damaged_in

    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        why = "has no checkpoints/ in it: name the folder of a run" if run_dir.is_dir() else "no such folder"
        raise ConfigError(f"{argument} {run_dir}: {why}")
    damaged = damaged_in(folder)
    if paths := [*complete_checkpoints(folder), *damaged] if set_aside else complete_checkpoints(folder):
        return sorted(paths, key=step_of)
    why = " but damaged ones that were set aside: see `ls`, `restore`" if damaged else " yet: train until one is saved"
    raise ConfigError(f"{argument} {run_dir}: has no checkpoint{why}")


def pick_step(paths: Sequence[Path], step: int, argument: str) -> Path:
    """Returns the first of `paths` that is a checkpoint of `step`. Raises ConfigError."""
    if matches := [path for path in paths if step_of(path) == step]:
        return matches[0]
    steps = ", ".join(str(step_of(path)) for path in paths)
    raise ConfigError(f"{argument}{step}: no checkpoint of this step; there are {steps}")


def find_checkpoint(argument: str, value: str) -> FoundCheckpoint:
    """Verifies and returns the checkpoint of a folder, RUN_DIR or RUN_DIR:STEP. Raises ConfigError."""
    from trainer.checkpoint import format
    from trainer.checkpoint.load import FoundCheckpoint, find_newest

    path, (run_dir, _, step) = Path(value), value.rpartition(":")
    with raise_as_config_error(argument, value):
        try:
            if checkpoints_folder(path).is_dir() and list_checkpoints(path, argument):
                checkpoint, _ = find_newest(checkpoints_folder(path), set_aside=False)
                assert checkpoint  # there are some, and where none is whole it raises
                return checkpoint
            if run_dir and step.isdecimal() and not path.exists():
                path = pick_step(list_checkpoints(Path(run_dir), argument), int(step), f"{argument} {run_dir}:")
            if path.is_dir():
                return FoundCheckpoint(path, format.verify(path))
        except (format.DamagedCheckpoint, TrainingError) as error:
            raise ConfigError(f"{argument} {value}: {error}; name another one, which is whole") from None
    raise ConfigError(f"{argument} {value}: no such folder; name a checkpoint's, RUN_DIR or RUN_DIR:STEP")


@contextmanager
def raise_as_config_error(argument: str, value: object) -> Iterator[None]:
    """Raises a ConfigError that names the argument for what the storage refuses in the block."""
    try:
        yield
    except BrokenPipeError:  # the reader of what is printed went away
        raise
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}"
        raise ConfigError(f"{argument} {value}: {problem}; see to its permissions and its storage") from error


@contextmanager
def hold_run_lock(run_dir: Path) -> Iterator[None]:
    """Holds the run's lock during the block. Raises ConfigError if a run holds it or it cannot be taken."""
    try:
        lock = locks.acquire_run(run_dir)
    except Timeout:
        raise ConfigError(f"RUN_DIR {run_dir}: {locks.describe_run_lock(run_dir)}; stop it first") from None
    try:
        yield
    finally:
        lock.release()


def printable(text: object) -> str:
    """Returns the text such that it cannot steer a terminal: names come from files."""
    return str(text) if str(text).isprintable() else json.dumps(str(text))
