"""What the arguments of `onecurve checkpoint` name: runs, checkpoints."""

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


def checkpoints(run_dir: Path) -> Path:
    from trainer.run_directory import CHECKPOINTS

    return run_dir / CHECKPOINTS


def step_in(path: Path) -> int:
    """Returns the step of a checkpoint's folder, also of one that was set aside (`.damaged-step-00000100-1`)."""
    found = re.search(r"step-(\d+)", path.name)
    return int(found[1]) if found else -1


def saved(run_dir: Path, argument: str = "RUN_DIR", aside: bool = False) -> list[Path]:
    """All with a checkpoint's name in rising order of steps, also those set `aside`; at least one.

    Raises ConfigError; OSError.
    """
    from trainer.checkpoint.retention import complete_checkpoints, damaged_in

    folder = checkpoints(run_dir)
    if not folder.is_dir():
        why = "has no checkpoints/ in it: name the folder of a run" if run_dir.is_dir() else "no such folder"
        raise ConfigError(f"{argument} {run_dir}: {why}")
    damaged = damaged_in(folder)
    if paths := [*complete_checkpoints(folder), *damaged] if aside else complete_checkpoints(folder):
        return sorted(paths, key=step_in)
    why = " but damaged ones that were set aside: see `ls`, `restore`" if damaged else " yet: train until one is saved"
    raise ConfigError(f"{argument} {run_dir}: has no checkpoint{why}")


def of_step(paths: Sequence[Path], step: int, argument: str) -> Path:
    if found := [path for path in paths if step_in(path) == step]:
        return found[0]
    there = ", ".join(str(step_in(path)) for path in paths)
    raise ConfigError(f"{argument}{step}: no checkpoint of this step; there are {there}")


def named(argument: str, given: str) -> FoundCheckpoint:
    """The checkpoint that `given` names, verified. Raises ConfigError."""
    from trainer.checkpoint import format
    from trainer.checkpoint.load import FoundCheckpoint, find_newest

    path, (run_dir, _, step) = Path(given), given.rpartition(":")
    with readable(argument, given):
        try:
            if checkpoints(path).is_dir() and saved(path, argument):
                found, _ = find_newest(checkpoints(path), set_aside=False)
                assert found  # there are some, and where none is whole it raises
                return found
            if run_dir and step.isdecimal() and not path.exists():
                path = of_step(saved(Path(run_dir), argument), int(step), f"{argument} {run_dir}:")
            if path.is_dir():
                return FoundCheckpoint(path, format.verify(path))
        except (format.DamagedCheckpoint, TrainingError) as error:
            raise ConfigError(f"{argument} {given}: {error}; name another one, which is whole") from None
    raise ConfigError(f"{argument} {given}: no such folder; name a checkpoint's, RUN_DIR or RUN_DIR:STEP")


@contextmanager
def readable(argument: str, given: object) -> Iterator[None]:
    """What the storage refuses is a problem of the argument."""
    try:
        yield
    except BrokenPipeError:  # of who reads what is printed
        raise
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        raise ConfigError(f"{argument} {given}: {what}; see to its permissions and its storage") from error


@contextmanager
def nobody_trains(run_dir: Path) -> Iterator[None]:
    """Holds the run's lock meanwhile. Raises ConfigError where a run has it, or there can be none."""
    try:
        lock = locks.acquire_run(run_dir)
    except Timeout:
        raise ConfigError(f"RUN_DIR {run_dir}: {locks.describe_run_lock(run_dir)}; stop it first") from None
    try:
        yield
    finally:
        lock.release()


def shown(text: object) -> str:
    """Names come from files: none may steer a terminal."""
    return str(text) if str(text).isprintable() else json.dumps(str(text))
