"""Recognizes the launcher of this process, and sets the rank and rendezvous variables that torchrun would set.

Everything else reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and MASTER_ADDR and MASTER_PORT or MEETING.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import NamedTuple

from trainer.errors import ConfigError
from trainer.nodelist import expand

Environment = MutableMapping[str, str]
STANDARD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RENDEZVOUS = "ONECURVE_MEETING"  # key of a file in which the processes of one node meet, without a listening port
FIRST_PORT, PORTS = 15_000, 15_000  # below the ports that systems assign by themselves


class Launcher(NamedTuple):
    """A launcher, and its names of the STANDARD variables. `by`: a variable that only this launcher sets."""

    name: str
    variables: tuple[str, str, str, str]
    by: str
    give: str = "mpirun -x {0}=..., or mpiexec -genv {0} ..."  # how to pass a variable to all processes


# The first that fits: MPI's own launchers may start their daemons by srun, whose variables then are those of a daemon.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # type: ignore[arg-type]
        "OMPI_COMM_WORLD_SIZE",
    ),
    Launcher(
        "MVAPICH2",
        tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # type: ignore[arg-type]
        "MV2_COMM_WORLD_SIZE",
    ),
    Launcher("MPICH or Intel MPI", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), "MPI_LOCALRANKID"),
    Launcher(
        "srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_LOCAL_SIZE"), "SLURM_STEP_NUM_TASKS",
        "export {0}=... before srun",
    ),
    Launcher("PMI", ("PMI_RANK", "PMI_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "PMI_SIZE"),
    Launcher("PMIx", ("PMIX_RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "PMIX_RANK"),
    Launcher(
        "Kubernetes", ("PET_NODE_RANK", "PET_NNODES", "PET_LOCAL_RANK", "PET_LOCAL_WORLD_SIZE"), "PET_NODE_RANK",
        "env: in the pod's template",
    ),
)  # fmt: skip


def recognize(environment: Environment = os.environ) -> None:
    """Sets the standard variables where the launcher sets others. Changes nothing under torchrun or `onecurve train`,
    nor in a process that is alone.

    Raises ConfigError where the variables contradict each other or are incomplete.
    """
    if any(name in environment for name in ("TORCHELASTIC_RUN_ID", "ONECURVE_STORE", RENDEZVOUS)):
        return
    variables = dict(environment) | _slurm_variables(environment) | _kubernetes_variables(environment)
    launcher = next((one for one in LAUNCHERS if one.by in environment and _has_several(one, variables)), None)
    if "RANK" in environment and (launcher is None or "LOCAL_RANK" in environment):
        _complete_variables(environment, launcher)
    elif launcher:
        _translate_variables(launcher, variables, environment)
    elif _parse_count("WORLD_SIZE", environment.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}, but RANK is not set: set both, or start by torchrun"
        )


def are_by_hand(environment: Environment = os.environ) -> bool:
    """Returns whether RANK is set by an unknown launcher: it may be left over, and no other process may come."""
    return "RANK" in environment and variables_to_unset(environment) == list(STANDARD[:2])


def variables_to_unset(environment: Environment = os.environ) -> list[str]:
    """Returns the variables to unset for a process to be alone; none under torchrun and `onecurve train`, which start
    all ranks that they announce."""
    if any(name in environment for name in ("TORCHELASTIC_RUN_ID", "ONECURVE_STORE")):
        return []
    return [launcher.by for launcher in LAUNCHERS if launcher.by in environment] or list(STANDARD[:2])


def _has_several(launcher: Launcher, values: Environment) -> bool:
    size = values.get(launcher.variables[1])
    return size is None or _parse_count(launcher.variables[1], size) > 1


def _complete_variables(environment: Environment, launcher: Launcher | None) -> None:
    """Completes variables set by hand, or by the operator of PyTorchJobs, which starts one process a pod."""
    if "WORLD_SIZE" not in environment:
        raise ConfigError(f"RANK={environment['RANK']}, but WORLD_SIZE is not set: set both, or start by torchrun")
    rank, size = (_parse_count(name, environment[name]) for name in STANDARD[:2])
    if launcher and (launcher_rank := environment.get(launcher.variables[0])) and launcher_rank != environment["RANK"]:
        raise ConfigError(
            f"RANK={rank}, but {launcher.variables[0]}={launcher_rank} of {launcher.name}: two launchers; unset RANK "
            "and the like"
        )
    is_one_node = environment.get("MASTER_ADDR", "") in ("localhost", "127.0.0.1", "::1")
    environment.setdefault("LOCAL_RANK", str(rank if is_one_node else 0))
    environment.setdefault("LOCAL_WORLD_SIZE", str(size if is_one_node else 1))
    _check_ranks("RANK", environment)
    if size > 1:
        _set_rendezvous(environment, "the launcher", "set {0}", "RANK")


def _translate_variables(launcher: Launcher, variables: Environment, environment: Environment) -> None:
    missing = [name for name in launcher.variables if name not in variables]
    if launcher.variables[0] in variables:
        environment.setdefault("RANK", variables[launcher.variables[0]])  # first of all: only rank 0 reports a problem
    if missing:
        raise ConfigError(
            f"started by {launcher.name}, which does not say {', '.join(missing)}: set "
            f"{', '.join(STANDARD[launcher.variables.index(name)] for name in missing)}, or start by torchrun"
        )
    for name, variable in zip(STANDARD, launcher.variables, strict=True):
        if name in environment and name != variable and environment[name] != variables[variable]:
            raise ConfigError(
                f"{name}={environment[name]}, but {variable}={variables[variable]} of {launcher.name}: unset one of "
                "them"
            )
        environment[name] = variables[variable]
    _check_ranks(launcher.name, environment)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name in variables:
            environment.setdefault(name, variables[name])
    _set_rendezvous(environment, launcher.name, launcher.give, launcher.variables[0])


def _set_rendezvous(environment: Environment, name: str, give: str, variable: str) -> None:
    are_set = [key in environment for key in ("MASTER_ADDR", "MASTER_PORT")]
    if all(are_set):
        return
    if not any(are_set) and environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]:
        environment[RENDEZVOUS] = _start_key(environment, variable)
        return
    missing = [variable for variable, is_set in zip(("MASTER_ADDR", "MASTER_PORT"), are_set, strict=True) if not is_set]
    raise ConfigError(
        f"{environment['WORLD_SIZE']} processes of {name} on several nodes do not know where to meet: set "
        f"{' and '.join(missing)} (the address of rank 0's node, a free port there): "
        f"{'; '.join(give.format(key) for key in missing)}"
    )


def _check_ranks(name: str, environment: Environment) -> None:
    rank, size, local_rank, local_size = (_parse_count(key, environment.get(key, "")) for key in STANDARD)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        values = " ".join(f"{key}={environment[key]}" for key in STANDARD)
        raise ConfigError(
            f"{name}: {values} contradict each other: ranks count from 0, and a node has no more than all"
        )


def _slurm_variables(environment: Environment) -> dict[str, str]:
    """Returns variables derived from those of srun: how many tasks this node has, and where the first one is. Only for
    a step with several tasks: the shell of a batch job or of salloc is not a rank."""
    size = environment.get("SLURM_STEP_NUM_TASKS", "")
    if not size.isdecimal() or int(size) < 2:
        return {}
    variables = {}
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    counts = list(_expand_counts(tasks))
    node = environment.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        variables["SLURM_LOCAL_SIZE"] = str(counts[int(node)])
    nodes = expand(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "")
    job, step = (environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if len(counts) > 1 and nodes and job.isdecimal() and step.isdecimal():
        variables["MASTER_ADDR"] = nodes[0]
        variables["MASTER_PORT"] = str(FIRST_PORT + (13 * int(job) + int(step)) % PORTS)
    return variables


def _expand_counts(text: str) -> Iterator[int]:
    """Expands Slurm's counts: `2(x3),1` -> 2 2 2 1."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(count)] * int(times or 1)


def _kubernetes_variables(environment: Environment) -> dict[str, str]:
    """Returns the variables of a training job's pod that are meant for torchrun, where it did not start the trainer."""
    if not any(name.startswith("PET_NNODES") for name in environment):
        return {}
    processes = environment.get("PET_NPROC_PER_NODE", "1")
    if processes.isdecimal() and int(processes) > 1:
        raise ConfigError(
            f"PET_NPROC_PER_NODE={processes}: start by `torchrun -m trainer ...`, which reads it, not by python"
        )
    variables = {"PET_LOCAL_RANK": "0", "PET_LOCAL_WORLD_SIZE": "1"}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if f"PET_{name}" in environment:
            variables[name] = environment[f"PET_{name}"]
    return variables


def _start_key(environment: Environment, variable: str) -> str:
    """Returns a key that all processes of this start share, and no other start has: a hash of the process that started
    them and its start time. That is the nearest ancestor without a rank in `variable`; shells in between have one."""
    process = os.getppid()
    while process > 1 and _is_rank(process, variable):
        process = int(_read_stat(process)[1])
    if process <= 1:
        raise ConfigError(
            "the process that started the ranks cannot be seen from here (containers?): set MASTER_ADDR=127.0.0.1 and "
            "MASTER_PORT to a free port"
        )
    names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    start = [process, _read_stat(process)[19], *(environment.get(name) for name in names)]
    return hashlib.sha256(repr(start).encode()).hexdigest()[:16]


def _is_rank(process: int, variable: str) -> bool:
    """Returns whether a process has a rank. Other users' processes, such as Slurm's, cannot be read, and have none."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(pair.startswith(f"{variable}=".encode()) for pair in variables)


def _read_stat(process: int) -> list[str]:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _parse_count(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(f"{name}={text}: is not a count of processes")
    return int(text)
