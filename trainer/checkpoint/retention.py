"""Retention: which checkpoints are kept, and how the others are deleted."""

from __future__ import annotations

import math
import re
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.format import DamagedCheckpoint, check_sizes, read_manifest
from trainer.checkpoint.reader import wait_for_answer
from trainer.errors import Outage, TrainingError
from trainer.files import move

STEP = re.compile(r"step-(\d{8,})")
TRASH, DAMAGED = ".trash-", ".damaged-"


def complete_checkpoints(folder: Path, patience_s: float | None = None) -> list[Path]:
    """Returns the folders that have a checkpoint's name, in ascending order of steps. Only `verify` tells whether one
    is whole. `patience_s`: how long to wait for storage that does not answer; None: the default."""
    matches = [(STEP.fullmatch(path.name), path) for path in entries(folder, patience_s)]
    steps = sorted((int(match[1]), path) for match, path in matches if match)
    return [path for _, path in steps if _is_folder(path, patience_s)]


def entries(folder: Path, patience_s: float | None = None) -> list[Path]:
    """Returns all paths in a folder. Raises Outage; OSError."""
    return wait_for_answer(folder, lambda: list(folder.iterdir()), patience_s)


def damaged_in(folder: Path) -> list[Path]:
    """Returns the damaged checkpoints that were set aside, ascending by step."""
    return sorted(path for path in entries(folder) if path.name.startswith(DAMAGED))


def _is_folder(path: Path, patience_s: float | None) -> bool:
    """Returns whether the path is there and not a link. Waits for storage that does not answer: that is not a no."""
    try:
        return stat.S_ISDIR(wait_for_answer(path, path.lstat, patience_s).st_mode)
    except FileNotFoundError:
        return False


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@dataclass(frozen=True)
class Retention:
    """The rule that keeps the newest `keep` checkpoints, those whose step is a multiple of `every`, and the one with
    the lowest `best`, a metric of the evaluation at its step."""

    keep: int = 2
    every: int | None = None
    best: str | None = None

    def removable(self, folder: Path) -> list[Path]:
        """Returns the checkpoints to delete, in ascending order of steps. Returns none if the newest is incomplete,
        since then the older ones are needed; nor if one cannot be read for now, since it may be the best."""
        try:
            checkpoints = complete_checkpoints(folder, patience_s=0)  # at once: training waits for it
            if not checkpoints or evaluation_of(checkpoints[-1]) is None:
                return []
            kept_steps = self.steps_to_keep(
                {step_of(path): evaluation_of(path) if self.best else None for path in checkpoints}
            )
        except (Outage, OSError):
            return []
        return [path for path in checkpoints if step_of(path) not in kept_steps]

    def steps_to_keep(self, evaluations: Mapping[int, dict[str, Any] | None]) -> set[int]:
        """Returns which of these steps are kept, given each step's evaluation."""
        steps = sorted(evaluations)
        kept_steps = set(steps[-self.keep :])
        if self.every:
            kept_steps |= {step for step in steps if step % self.every == 0}
        if self.best:
            scores = {step: (evaluations[step] or {}).get(self.best) for step in reversed(steps)}
            numbers = {step: n for step, n in scores.items() if isinstance(n, int | float) and math.isfinite(n)}
            kept_steps |= {min(numbers, key=numbers.__getitem__)} if numbers else set()
        return kept_steps

    def apply(self, folder: Path, suffix: str) -> None:
        """Deletes the removable checkpoints, each by a rename first, so that none is ever half there. `suffix` makes
        the new names unique in the folder."""
        for path in self.removable(folder):
            remove(path, suffix)


def remove(path: Path, suffix: str) -> None:
    """Renames a checkpoint, then deletes it; what is left after the rename does not count. Raises OSError if it cannot
    be renamed."""
    trash = path.with_name(f"{TRASH}{path.name}-{suffix}")
    move(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Deletes what interrupted saves and deletions left."""
    for leftover in (*folder.glob(".attempt-*"), *folder.glob(f"{TRASH}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob("step-*/.*.tmp"):  # of a manifest that was being replaced
        leftover.unlink(missing_ok=True)


def evaluation_of(path: Path) -> dict[str, Any] | None:
    """Returns the evaluation at a checkpoint's step; None if the checkpoint is incomplete. Raises OSError; Outage at
    once if the storage does not answer."""
    with suppress(DamagedCheckpoint, TrainingError, FileNotFoundError):
        manifest = read_manifest(path, patience_s=0)
        check_sizes(path, manifest, patience_s=0)
        return manifest.get("evaluation") or {}
    return None
