"""Keys of the launch: processes on this machine, or a job of Slurm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from trainer.config.interval import Interval
from trainer.config.section import Count, Int, IntervalText, Plugin, Positive, Section
from trainer.secrets import holds_secret

# The times that sbatch accepts: minutes, min:sec, h:min:sec, days-h, days-h:min, days-h:min:sec.
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)


def slurm_seconds(text: str) -> int:
    """Converts a time in sbatch's notation to seconds. Raises ValueError with the accepted forms."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError("should be a time of Slurm: 90 (minutes), 4:00:00 or 2-12:00:00 (days-hours:minutes:seconds)")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        parts += [0] * (3 - len(parts))  # hours come first
    elif len(parts) == 1:
        parts = [0, parts[0], 0]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class Launch(Plugin):
    command: ClassVar[str]
    """The command of `onecurve` that starts a run this way."""

    restarts: Int = Field(
        ge=0,
        description="How often the run is restarted from the newest checkpoint when a process was killed, crashed or "
        "hung. Counted anew with each new checkpoint; the same failure twice at one step ends the run at once.",
    )
    timeout_s: Count = Field(
        description="Seconds after which a collective that hangs is an error. Those of a save wait for two hours at "
        "least: with `watchdog.enabled` it ends a save that hangs long before that."
    )
    time_limit: IntervalText | None = Field(
        description="Wall time, such as `3h`, after which the run stops as if it was asked to: saved, exit code 75."
    )

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        if self.time_limit is not None and Interval.parse(self.time_limit).unit != "seconds":
            yield f"launch.time_limit={self.time_limit}: should be a time, such as 3h or 90min"

    def command_line(self, procs: int) -> str:
        """Returns the command line that starts a run of that many processes."""
        return self.command

    @property
    def processes(self) -> int | None:
        """Returns the number of processes of the whole run; None means one for each GPU."""
        return None


class Local(Launch):
    command = "train"

    procs: Count | None = Field(description="Processes that `onecurve train` starts. null: one a GPU, or one.")
    min_procs: Count | None = Field(
        description="`onecurve train` goes on with as few as these where a process fails again and again; the global "
        "batch stays. null: with all or not at all."
    )
    grow_s: Positive = Field(description="Seconds after which a run that goes on with fewer tries all of them again.")
    grace_s: Count = Field(description="Seconds that processes get to save when `onecurve train` is told to stop.")

    def command_line(self, procs: int) -> str:
        return f"{self.command} -n {procs}"

    @property
    def processes(self) -> int | None:
        return self.procs


class Container(Section):
    runtime: Literal["pyxis", "apptainer"] | None = Field(
        description="What the processes run in: pyxis (Slurm's plugin: `srun --container-image`), apptainer, or null: "
        "the nodes' own system."
    )
    image: str | None = Field(description="Image, in the runtime's own form: `nvcr.io#nvidia/pytorch:26.01`, a file.")
    mounts: list[str] = Field(
        description="Folders to see inside, `/outside:/inside`, besides the one that the job was submitted from and "
        "the run's own."
    )


class Slurm(Launch):
    command = "submit"

    nodes: Count = Field(description="Nodes of the job.")
    gpus_per_node: Int = Field(ge=0, description="GPUs of each node, one process each. 0: asks for none.")
    procs_per_node: Count | None = Field(description="Processes on each node. null: one a GPU, or one.")
    time: str = Field(description="Time limit of the job: `4:00:00`, `2-12:00:00` (days), `90` (minutes).")
    lead_s: Count = Field(
        description="Seconds before the time limit at which the run is asked to save and stop; then the job queues "
        "itself again. Slurm may be a minute early. More than twice what a save takes."
    )
    requeue: bool = Field(
        description="The job queues again when its time is up, or a node fails, until the run is finished. false: "
        "where a site does not allow it; see `launch.chain`."
    )
    chain: Count = Field(
        description="Jobs that are submitted together, one after the other (`--dependency=afterany`): each goes on "
        "where the one before stopped; what is left when the run is finished is canceled."
    )
    max_parallel: Count | None = Field(description="Jobs of a sweep that run at a time. null: as many as Slurm lets.")
    account: str | None = Field(description="Account that pays. null: the default one.")
    partition: str | None = Field(description="Partition. null: the default one.")
    qos: str | None = Field(description="Quality of service.")
    constraint: str | None = Field(description="Features that nodes must have.")
    reservation: str | None = Field(description="Reservation to use.")
    exclude: str | None = Field(description="Nodes not to use, such as `n[3,7-9]`.")
    cpus_per_task: Count | None = Field(
        description="CPU cores of each node's part of the job. null: the site's default."
    )
    memory: str | None = Field(description="Memory of each node, such as `500G`; `0` is all of it.")
    exclusive: bool = Field(description="Nobody else's jobs on the nodes.")
    options: list[str] = Field(description="Further options of sbatch: `['--mail-type=END', '--licenses=x']`.")
    setup: list[str] = Field(
        description="Lines of shell at the start of the job, as they are: `['module load cuda', 'source "
        "env/bin/activate']`."
    )
    python: str | None = Field(
        description="Python on the nodes. null: the one that submits; in a container the image's `python3`."
    )
    interface: str | None = Field(
        description="Network interface of NCCL and gloo, such as `ib0` or `eth0`: NCCL_SOCKET_IFNAME, "
        "GLOO_SOCKET_IFNAME. null: they choose."
    )
    ib_devices: str | None = Field(description="InfiniBand devices, such as `mlx5_0,mlx5_1`: NCCL_IB_HCA.")
    nccl_debug: Literal["VERSION", "WARN", "INFO", "TRACE"] = Field(description="What NCCL logs: NCCL_DEBUG.")
    env: dict[str, str] = Field(
        description="Further variables of the environment, such as `{NCCL_NET_GDR_LEVEL: PHB}`. No secrets: they are "
        "written into the run's folder; export those before you submit."
    )
    container: Container
    health_check: bool = Field(
        description="`onecurve doctor --quick` on all nodes before the start and after a failure: the job goes back to "
        "the queue without the nodes that fail it."
    )

    def problems(self, sections: Mapping[str, Any], world_size: int) -> Iterator[str]:
        yield from super().problems(sections, world_size)
        if self.lead_s >= (limit := slurm_seconds(self.time)):
            yield f"launch.lead_s={self.lead_s}: must be less than launch.time={self.time}, which is {limit} s"
        if self.chain > 1 and self.requeue:
            remedy = "set launch.requeue=false, or launch.chain=1"
            yield f"launch.chain={self.chain}: a job that queues itself again needs no other behind it; {remedy}"
        if self.health_check and self.container.runtime:
            yield "launch.health_check=true: looks at nodes, not into containers; set one of them aside"
        if bool(self.container.runtime) != bool(self.container.image):
            missing = "image" if self.container.runtime else "runtime"
            yield f"launch.container.{missing}: missing; a container has both a runtime and an image"

    @property
    def processes(self) -> int:
        return self.nodes * self.local_processes

    @property
    def local_processes(self) -> int:
        """Returns the number of processes on each node."""
        return self.procs_per_node or max(1, self.gpus_per_node)

    @field_validator("time")
    @classmethod
    def _check_time(cls, text: str) -> str:
        slurm_seconds(text)
        return text

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"'{name}' is not a name of a variable")
            if _SECRET.search(name) or holds_secret(value):
                raise PydanticCustomError(
                    "secret", "{name} looks like a secret; export it before you submit", {"name": name}
                )
        return env

    @field_validator("account", "partition", "qos", "constraint", "reservation", "exclude", "memory")
    @classmethod
    def _one_word(cls, text: str | None) -> str | None:
        if text is not None and (not text or re.search(r"\s", text)):
            raise ValueError("should be one word")
        return text

    @field_validator("setup", "options")
    @classmethod
    def _no_secrets_in_text(cls, lines: list[str]) -> list[str]:
        """Refuses secrets: the lines are written into the script of the job."""
        for line in lines:
            if holds_secret(line):
                content = "an address with a password or a signature: export that before you submit, and write $NAME"
                raise PydanticCustomError("secret", "holds {content}", {"content": content})
            if match := re.search(r"\w*(?:KEY|TOKEN|SECRET|PASSW)\w*(?==[^$\s])", line, re.IGNORECASE):
                raise PydanticCustomError(
                    "secret", "{name} looks like a secret; export it before you submit", {"name": match[0]}
                )
        return lines

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"'{option}' should start with a dash, as on sbatch's command line")
        return options
