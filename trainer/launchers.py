"""Who started this process as one of several, and where they meet: what torchrun did not set is set here.

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
RENDEZVOUS = "ONECURVE_MEETING"  # the key of a file in which the processes of one node meet: nothing listens
FIRST_PORT, PORTS = 15_000, 15_000  # below those that systems give away


class Launcher(NamedTuple):
    """The variables in which it tells what the STANDARD ones do. `by`: what is also there only if it is this one."""

    name: str
    variables: tuple[str, str, str, str]
    by: str
    give: str = "mpirun -x {0}=..., or mpiexec -genv {0} ..."  # how a variable is given to all processes


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
    """Sets the standard variables where the launcher has others. Nothing is changed under torchrun or `onecurve train`,
    nor in a process that is alone.

    Raises ConfigError: they contradict each other, or do not say enough.
    """
    if any(name in environment for name in ("TORCHELASTIC_RUN_ID", "ONECURVE_STORE", RENDEZVOUS)):
        return
    told = dict(environment) | _of_slurm(environment) | _of_kubernetes(environment)
    found = next((one for one in LAUNCHERS if one.by in environment and _several(one, told)), None)
    if "RANK" in environment and (found is None or "LOCAL_RANK" in environment):
        _given(environment, found)
    elif found:
        _translated(found, told, environment)
    elif _number("WORLD_SIZE", environment.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']}, but RANK is not set: set both, or start by torchrun"
        )


def are_by_hand(environment: Environment = os.environ) -> bool:
    """Returns whether RANK is set, but by no launcher that is known: it may be left over, and no other process come."""
    return "RANK" in environment and variables_to_unset(environment) == list(STANDARD[:2])


def variables_to_unset(environment: Environment = os.environ) -> list[str]:
    """Returns the variables without which a process is alone; none under torchrun and `onecurve train`, which start
    all that they speak of."""
    if any(name in environment for name in ("TORCHELASTIC_RUN_ID", "ONECURVE_STORE")):
        return []
    return [launcher.by for launcher in LAUNCHERS if launcher.by in environment] or list(STANDARD[:2])


def _several(launcher: Launcher, values: Environment) -> bool:
    size = values.get(launcher.variables[1])
    return size is None or _number(launcher.variables[1], size) > 1


def _given(environment: Environment, found: Launcher | None) -> None:
    """RANK was set by hand, or by the operator of PyTorchJobs, which starts one process a pod."""
    if "WORLD_SIZE" not in environment:
        raise ConfigError(f"RANK={environment['RANK']}, but WORLD_SIZE is not set: set both, or start by torchrun")
    rank, size = (_number(name, environment[name]) for name in STANDARD[:2])
    if found and (theirs := environment.get(found.variables[0])) and theirs != environment["RANK"]:
        raise ConfigError(
            f"RANK={rank}, but {found.variables[0]}={theirs} of {found.name}: two launchers; unset RANK and the like"
        )
    here = environment.get("MASTER_ADDR", "") in ("localhost", "127.0.0.1", "::1")
    environment.setdefault("LOCAL_RANK", str(rank if here else 0))
    environment.setdefault("LOCAL_WORLD_SIZE", str(size if here else 1))
    _checked("RANK", environment)
    if size > 1:
        _set_rendezvous(environment, "the launcher", "set {0}", "RANK")


def _translated(launcher: Launcher, told: Environment, environment: Environment) -> None:
    missing = [name for name in launcher.variables if name not in told]
    if launcher.variables[0] in told:
        environment.setdefault("RANK", told[launcher.variables[0]])  # before all: only rank 0 tells of a problem
    if missing:
        raise ConfigError(
            f"started by {launcher.name}, which does not say {', '.join(missing)}: set "
            f"{', '.join(STANDARD[launcher.variables.index(name)] for name in missing)}, or start by torchrun"
        )
    for name, theirs in zip(STANDARD, launcher.variables, strict=True):
        if name in environment and name != theirs and environment[name] != told[theirs]:
            raise ConfigError(
                f"{name}={environment[name]}, but {theirs}={told[theirs]} of {launcher.name}: unset one of them"
            )
        environment[name] = told[theirs]
    _checked(launcher.name, environment)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name in told:
            environment.setdefault(name, told[name])
    _set_rendezvous(environment, launcher.name, launcher.give, launcher.variables[0])


def _set_rendezvous(environment: Environment, name: str, give: str, variable: str) -> None:
    there = [key in environment for key in ("MASTER_ADDR", "MASTER_PORT")]
    if all(there):
        return
    if not any(there) and environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]:
        environment[RENDEZVOUS] = _key(environment, variable)
        return
    missing = [
        variable for variable, is_there in zip(("MASTER_ADDR", "MASTER_PORT"), there, strict=True) if not is_there
    ]
    raise ConfigError(
        f"{environment['WORLD_SIZE']} processes of {name} on several nodes do not know where to meet: set "
        f"{' and '.join(missing)} (the address of rank 0's node, a free port there): "
        f"{'; '.join(give.format(key) for key in missing)}"
    )


def _checked(name: str, environment: Environment) -> None:
    rank, size, local_rank, local_size = (_number(key, environment.get(key, "")) for key in STANDARD)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        told = " ".join(f"{key}={environment[key]}" for key in STANDARD)
        raise ConfigError(f"{name}: {told} contradict each other: ranks count from 0, and a node has no more than all")


def _of_slurm(environment: Environment) -> dict[str, str]:
    """What srun says in other words: how many tasks this node has, and who is the first of them. Only of a step with
    several tasks: the shell of a batch job or of salloc is not a rank."""
    size = environment.get("SLURM_STEP_NUM_TASKS", "")
    if not size.isdecimal() or int(size) < 2:
        return {}
    told = {}
    counts = list(_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))))
    node = environment.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        told["SLURM_LOCAL_SIZE"] = str(counts[int(node)])
    nodes = expand(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "")
    job, step = (environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if len(counts) > 1 and nodes and job.isdecimal() and step.isdecimal():
        told["MASTER_ADDR"] = nodes[0]
        told["MASTER_PORT"] = str(FIRST_PORT + (13 * int(job) + int(step)) % PORTS)
    return told


def _counts(text: str) -> Iterator[int]:
    """`2(x3),1` -> 2 2 2 1."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(count)] * int(times or 1)


def _of_kubernetes(environment: Environment) -> dict[str, str]:
    """What is set in the pods of a training job for torchrun, where the trainer was started without it."""
    if not any(name.startswith("PET_NNODES") for name in environment):
        return {}
    processes = environment.get("PET_NPROC_PER_NODE", "1")
    if processes.isdecimal() and int(processes) > 1:
        raise ConfigError(
            f"PET_NPROC_PER_NODE={processes}: start by `torchrun -m trainer ...`, which reads it, not by python"
        )
    told = {"PET_LOCAL_RANK": "0", "PET_LOCAL_WORLD_SIZE": "1"}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if f"PET_{name}" in environment:
            told[name] = environment[f"PET_{name}"]
    return told


def _key(environment: Environment, variable: str) -> str:
    """What all processes of this start share, and no other start has: the process that started them, by its start time.
    It is the nearest one above us that has no rank in `variable`; shells in between have."""
    process = os.getppid()
    while process > 1 and _is_rank(process, variable):
        process = int(_stat(process)[1])
    if process <= 1:
        raise ConfigError(
            "the process that started the ranks cannot be seen from here (containers?): set MASTER_ADDR=127.0.0.1 and "
            "MASTER_PORT to a free port"
        )
    names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    started = [process, _stat(process)[19], *(environment.get(name) for name in names)]
    return hashlib.sha256(repr(started).encode()).hexdigest()[:16]


def _is_rank(process: int, variable: str) -> bool:
    """Whether it was given a rank, too. Other users' processes, such as Slurm's, cannot be read, and are none."""
    try:
        given = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(pair.startswith(f"{variable}=".encode()) for pair in given)


def _stat(process: int) -> list[str]:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(f"{name}={text}: is not a count of processes")
    return int(text)
