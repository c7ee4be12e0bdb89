"""Which code a run was submitted with: commits, and what was changed since."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import trainer


def revision(folder: Path) -> tuple[dict[str, Any], str]:
    """What onecurve and the code in `folder` are, and the changes since their last commits as one diff."""
    ours, diff = _repository(Path(trainer.__file__).parent)
    theirs, more = _repository(folder)
    return {"onecurve": {"version": trainer.__version__, **ours}, "folder": {"path": str(folder), **theirs}}, (
        diff if diff == more else diff + more
    )


def _repository(folder: Path) -> tuple[dict[str, Any], str]:
    """Nothing where there is no git, or no repository of its."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        diff = _git(folder, "diff", "--no-color", "--no-ext-diff", "--binary", "HEAD")
        new = _git(folder, "status", "--porcelain", "--untracked-files=normal").splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}, ""
    return {"commit": commit, "changed": bool(diff), "untracked": [line[3:] for line in new if line[:2] == "??"]}, diff


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, check=True, timeout=30, errors="replace"
    )
    return done.stdout
