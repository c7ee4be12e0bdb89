"""Examines the Slurm job that this process is in."""

from __future__ import annotations

import os
import shutil
import subprocess

from launch.doctor.verdict import Finding
from trainer.nodelist import expand

PATIENCE_S = 10


def nodes() -> list[str]:
    """Returns this job's nodes if there are several and this process is not part of a step on all of them."""
    several = int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1) > 1
    names = expand(os.environ.get("SLURM_JOB_NODELIST", "")) if several else []
    return names if "SLURM_JOB_ID" in os.environ and shutil.which("srun") else []


def examine() -> list[Finding]:
    job, srun = os.environ.get("SLURM_JOB_ID"), shutil.which("srun")
    if job is None:
        message = "not in a job; its commands are here" if srun else "not here"
        return [Finding("Slurm", "good", message)]
    if not srun:
        advice = "load Slurm's module, or mount its commands into the container"
        return [Finding("Slurm", "warning", f"job {job}, but srun is not found: other nodes are not checked", advice)]
    message = f"job {job} on {os.environ.get('SLURM_JOB_NUM_NODES', '1')} nodes"
    try:
        queue = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format=%L"], capture_output=True, text=True, timeout=PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        queue = None
    if queue is None or queue.returncode:
        advice = "`scontrol ping` tells whether slurmctld is up; requeueing needs it"
        return [Finding("Slurm", "warning", f"{message}; squeue does not answer", advice)]
    return [Finding("Slurm", "good", f"{message}, {queue.stdout.strip() or 'unknown'} left")]
