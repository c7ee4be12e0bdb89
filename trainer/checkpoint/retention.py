"""Which checkpoints stay."""

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
    """The folders that have a checkpoint's name, in rising order of steps. Only `verify` says whether they are one.
    `patience_s`: how long storage that does not answer is waited for, if not as usual."""
    named = [(STEP.fullmatch(path.name), path) for path in entries(folder, patience_s)]
    found = sorted((int(match[1]), path) for match, path in named if match)
    return [path for _, path in found if _is_folder(path, patience_s)]


def entries(folder: Path, patience_s: float | None = None) -> list[Path]:
    """All that lies in it. Raises Outage; OSError."""
    return wait_for_answer(folder, lambda: list(folder.iterdir()), patience_s)


def damaged_in(folder: Path) -> list[Path]:
    """Returns the damaged checkpoints that were set aside, ascending by step."""
    return sorted(path for path in entries(folder) if path.name.startswith(DAMAGED))


def _is_folder(path: Path, patience_s: float | None) -> bool:
    """Whether it is there, and no link: what storage does not tell for now is not taken for a no."""
    try:
        return stat.S_ISDIR(wait_for_answer(path, path.lstat, patience_s).st_mode)
    except FileNotFoundError:
        return False


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@dataclass(frozen=True)
class Retention:
    """The newest `keep` stay; those whose step is a multiple of `every`; and the one with the lowest `best`, a number
    of the evaluation at its step."""

    keep: int = 2
    every: int | None = None
    best: str | None = None

    def removable(self, folder: Path) -> list[Path]:
        """In rising order of steps. None where the newest is not all there: then the older ones are needed; nor where
        one cannot be read for now: it may be the best."""
        try:
            found = complete_checkpoints(folder, patience_s=0)  # at once: training waits for it
            if not found or evaluation_of(found[-1]) is None:
                return []
            stay = self.kept({step_of(path): evaluation_of(path) if self.best else None for path in found})
        except (Outage, OSError):
            return []
        return [path for path in found if step_of(path) not in stay]

    def kept(self, evaluations: Mapping[int, dict[str, Any] | None]) -> set[int]:
        """Returns which of these steps are kept, given each step's evaluation."""
        steps = sorted(evaluations)
        stay = set(steps[-self.keep :])
        if self.every:
            stay |= {step for step in steps if step % self.every == 0}
        if self.best:
            scores = {step: (evaluations[step] or {}).get(self.best) for step in reversed(steps)}
            numbers = {step: n for step, n in scores.items() if isinstance(n, int | float) and math.isfinite(n)}
            stay |= {min(numbers, key=numbers.__getitem__)} if numbers else set()
        return stay

    def apply(self, folder: Path, word: str) -> None:
        """Deletes them, each by a rename first, so that none is ever half there. `word` is not in use in the folder."""
        for path in self.removable(folder):
            remove(path, word)


def remove(path: Path, word: str) -> None:
    """Raises OSError where it cannot be renamed; what is left of it after that does not count."""
    trash = path.with_name(f"{TRASH}{path.name}-{word}")
    move(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """What interrupted saves and deletions left."""
    for left in (*folder.glob(".attempt-*"), *folder.glob(f"{TRASH}*")):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob("step-*/.*.tmp"):  # of a manifest that was to be replaced
        left.unlink(missing_ok=True)


def evaluation_of(path: Path) -> dict[str, Any] | None:
    """What was measured at its step; None if it is not all there. Raises Outage at once where its storage does not
    answer, OSError."""
    with suppress(DamagedCheckpoint, TrainingError, FileNotFoundError):
        manifest = read_manifest(path, patience_s=0)
        check_sizes(path, manifest, patience_s=0)
        return manifest.get("evaluation") or {}
    return None
