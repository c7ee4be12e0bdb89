"""Finds out whether a run is alive. Its status cannot say that its process was killed; the lock of its folder can."""

from __future__ import annotations

import json
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from launch.slurm_queue import jobs_of
from trainer import locks
from trainer.processes import ATTEMPT, boot_id, process_exists
from trainer.tracking.jsonl import read_status

PATIENCE_S = 60.0  # without a sign: longer than a launcher pauses before it starts a run again
SIGNS = ("status.json", "metrics.jsonl", "events.jsonl", "goodput.jsonl", "logs/*", "checkpoints/*")


def dead_since(run: Path) -> float | None:
    """Returns when a run that claims to be running, though no process trains it, gave its last sign (`time.time()`).

    Returns None if a process trains it or may, if it has ended in order, for jobs of Slurm, which reports them itself,
    and for runs of another machine, whose lock may not be visible here. The lock is only tried where there was no sign
    for a while: a process that starts the run at that moment would find it taken.
    """
    if (
        read_status(run).get("state") != "running"
        or jobs_of(run)
        or not _is_of_this_machine(run)
        or _is_process_alive(run)
    ):
        return None
    sign = last_sign(run)
    if time.time() < sign + PATIENCE_S:
        return None
    with suppress(Timeout, OSError):  # taken; or a folder that cannot be written, or has no locks
        locks.acquire_run(run).release()
        return sign
    return None


def _is_of_this_machine(run: Path) -> bool:
    """Returns whether the run's last attempt was on this machine, or does not say where it was."""
    attempt = _read_json(run / ATTEMPT) or _read_json(run / "environment.json")  # earlier versions write only this file
    return attempt.get("host", platform.node()) == platform.node()


def _is_process_alive(run: Path) -> bool:
    """Returns whether the process of the last attempt still exists, though it may not have the lock yet."""
    attempt = _read_json(run / ATTEMPT)
    try:
        return attempt["boot"] == boot_id() and process_exists(int(attempt["pid"]), attempt["started"])
    except (KeyError, TypeError, ValueError):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        values = json.loads(path.read_bytes())
        return values if isinstance(values, dict) else {}
    return {}


def last_sign(run: Path) -> float:
    """Returns when something was last written in the run's folder; 0 where nothing is there."""
    latest = 0.0
    for path in (path for pattern in SIGNS for path in run.glob(pattern)):
        with suppress(OSError):
            latest = max(latest, path.stat().st_mtime)
    return latest


def describe_death(since: float) -> str:
    """Returns a sentence on how long a run has been dead, and what to do."""
    ago, when = time.time() - since, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    silence = f"{ago / 3600:.1f} h" if ago >= 5400 else f"{ago / 60:.0f} min"
    return f"since {when}: no sign for {silence}, and no process has its folder; run the same command again to continue"
