"""Writes the script of a Slurm job: what differs from job to job, followed by slurm/job.sh, which does not."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from trainer.config.launch import Slurm


class Task(NamedTuple):
    """One run, and the file of its whole config."""

    folder: Path
    config: Path


def render(launch: Slurm, name: str, tasks: Sequence[Task], log: Path, folder: Path, array: bool = False) -> str:
    """Returns a script for sbatch, for one run or for a job array of several. `log` has sbatch's `%` patterns; the job
    works in `folder`. All paths are absolute."""
    blocks = [
        "#!/bin/bash",
        f"# {name}, by `onecurve submit`. `sbatch` of this file submits it again, and the run goes on where it stands.",
        *(f"#SBATCH {option}" for option in options(launch, name, log, folder, len(tasks) if array else 0)),
        "",
        *settings(launch, tasks, folder),
        "",
        resources.files("launch.slurm").joinpath("job.sh").read_text(),
    ]
    return "\n".join(blocks)


def options(launch: Slurm, name: str, log: Path, folder: Path, tasks: int) -> Iterator[str]:
    """Yields the options of sbatch. `tasks` is the size of a job array, or 0 if it is not one."""
    if launch.chain > 1:  # `singleton` goes by the name: another run of this name must not count
        yield f"--job-name={name}-{hashlib.sha256(os.fspath(log).encode()).hexdigest()[:8]}"
        yield "--dependency=singleton"
    else:
        yield f"--job-name={name}"
    yield f"--nodes={launch.nodes}"
    yield "--ntasks-per-node=1"
    if launch.gpus_per_node:
        yield f"--gpus-per-node={launch.gpus_per_node}"
    yield f"--time={launch.time}"
    yield f"--signal=B:USR1@{launch.lead_s}"
    yield "--requeue" if launch.requeue else "--no-requeue"
    yield "--open-mode=append"
    yield f"--chdir={_quote(folder)}"
    yield f"--output={_quote(log)}"
    if tasks:
        yield f"--array=0-{tasks - 1}" + (f"%{launch.max_parallel}" if launch.max_parallel else "")
    for key in ("account", "partition", "qos", "constraint", "reservation", "exclude"):
        if (value := getattr(launch, key)) is not None:
            yield f"--{key}={value}"
    if launch.cpus_per_task:
        yield f"--cpus-per-task={launch.cpus_per_task}"
    if launch.memory:
        yield f"--mem={launch.memory}"
    if launch.exclusive:
        yield "--exclusive"
    yield from launch.options


def settings(launch: Slurm, tasks: Sequence[Task], folder: Path) -> Iterator[str]:
    """Yields lines of shell: variables that job.sh reads, the environment of the ranks, the user's own lines."""
    runtime = launch.container.runtime
    python = launch.python or ("python3" if runtime else sys.executable)
    yield _array("run_dirs", [str(task.folder) for task in tasks])
    yield _array("configs", [str(task.config) for task in tasks])
    yield f"procs_per_node={launch.local_processes} restarts={launch.restarts} lead_s={launch.lead_s}"
    flags = {"requeue": launch.requeue, "health_check": launch.health_check}
    yield " ".join(f"{name}={'1' if on else shlex.quote('')}" for name, on in flags.items())
    yield f"python={shlex.quote(python)}"
    yield from _container(launch, tasks, folder)
    for name, value in environment(launch).items():
        yield f"export {name}={shlex.quote(value)}"
    yield from launch.setup


def environment(launch: Slurm) -> dict[str, str]:
    """Returns the environment variables of the ranks."""
    variables: dict[str, str] = {"NCCL_DEBUG": launch.nccl_debug}
    if launch.interface:
        variables |= {"NCCL_SOCKET_IFNAME": launch.interface, "GLOO_SOCKET_IFNAME": launch.interface}
    if launch.ib_devices:
        variables["NCCL_IB_HCA"] = launch.ib_devices
    if launch.cpus_per_task:
        variables["OMP_NUM_THREADS"] = str(max(1, launch.cpus_per_task // launch.local_processes))
    return variables | launch.env


def _container(launch: Slurm, tasks: Sequence[Task], folder: Path) -> Iterator[str]:
    """Yields the container's arguments for srun (pyxis) or the command to run in it (apptainer)."""
    container = launch.container
    folders = dict.fromkeys([str(folder), *(str(task.folder) for task in tasks)])
    mounts = ",".join([*(f"{path}:{path}" for path in folders), *container.mounts])
    image, srun, command = container.image or "", list[str](), list[str]()
    if container.runtime == "pyxis":
        srun = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={folder}"]
    if container.runtime == "apptainer":
        gpus = ["--nv"] if launch.gpus_per_node else []
        command = ["apptainer", "exec", *gpus, "--bind", mounts, "--pwd", str(folder), image]
    yield _array("container", srun)
    yield _array("inside", command)


def _array(name: str, values: Sequence[str]) -> str:
    return f"{name}=({shlex.join(values)})"


def _quote(path: Path) -> str:
    """Quotes a path for a line of #SBATCH, where a backslash escapes and no shell expands."""
    return shlex.quote(os.fspath(path))
