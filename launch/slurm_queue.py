"""Slurm's queue: submits, lists and cancels jobs. Works without Slurm's accounting."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError

ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING")
TIMEOUT_S = 60
JOBS = "slurm/jobs"  # a job's id on each line; slurm/job.sh reads it, too


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def submit(script: Path) -> str:
    """Submits a script and returns the job's id. Raises ConfigError with Slurm's reason."""
    return _run("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def test_only(script: str) -> str:
    """Returns when Slurm would start a script. Raises ConfigError if Slurm refuses it."""
    return _run("sbatch", "--test-only", script=script).strip()


def states(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns {job or task of a job array: (state, why it waits or where it runs)}, without those that Slurm forgot."""
    if not jobs or not is_here():
        return {}
    job_states = {}
    for line in _run("squeue", "--me", "--noheader", "--states=all", "--array", "--format=%i|%T|%R").splitlines():
        name, state, place = line.split("|", 2)
        if name in jobs or name.partition("_")[0] in jobs:
            job_states[name] = (state, place)
    return job_states


def active(jobs: Sequence[str]) -> dict[str, str]:
    """Returns the state of each job that is pending or running."""
    return {name: state for name, (state, _) in states(jobs).items() if state in ACTIVE}


def cancel(jobs: Sequence[str], *options: str) -> None:
    if jobs:
        _run("scancel", *options, *jobs)


def _run(*command: str, script: str | None = None) -> str:
    try:
        process = subprocess.run(command, input=script, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]}: is not here; run this where Slurm is") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{command[0]}: no answer in {TIMEOUT_S} s; is Slurm's controller up? `scontrol ping`"
        ) from None
    if process.returncode:
        lines = [re.sub(rf"^{command[0]}: (error: )?", "", line) for line in process.stderr.splitlines()]
        raise ConfigError(f"{command[0]}: {'; '.join(filter(None, lines)) or f'exit code {process.returncode}'}")
    return process.stdout + (process.stderr if "--test-only" in command else "")


def jobs_of(folder: Path) -> list[str]:
    """Returns the jobs that were submitted for a run or sweep, oldest first."""
    try:
        return (folder / JOBS).read_text().split()
    except FileNotFoundError:
        return []


def note(folder: Path, number: str) -> None:
    """Adds a job that was submitted for a run or sweep."""
    with (folder / JOBS).open("a") as file:
        file.write(f"{number}\n")
