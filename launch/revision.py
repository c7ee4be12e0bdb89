"""Which code a run was submitted with: commits, and what was changed since."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import trainer


def revision(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the commits of onecurve and of the code in `folder`, and the changes since then as one diff."""
    ours, diff = _repository(Path(trainer.__file__).parent)
    theirs, other_diff = _repository(folder)
    return {"onecurve": {"version": trainer.__version__, **ours}, "folder": {"path": str(folder), **theirs}}, (
        diff if diff == other_diff else diff + other_diff
    )


def _repository(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns a repository's commit and changes; nothing where there is no git or no repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        diff = _git(folder, "diff", "--no-color", "--no-ext-diff", "--binary", "HEAD")
        new = _git(folder, "status", "--porcelain", "--untracked-files=normal").splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}, ""
    return {"commit": commit, "changed": bool(diff), "untracked": [line[3:] for line in new if line[:2] == "??"]}, diff


def _git(folder: Path, *arguments: str) -> str:
    process = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, check=True, timeout=30, errors="replace"
    )
    return process.stdout
