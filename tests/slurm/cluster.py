"""A Slurm of one's own: a controller and some nodes on the loopback, no privilege needed, up in seconds.

All nodes share the machine's name and their names resolve nowhere, as on some real clusters.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "munged")
CPUS = 8


def missing() -> str | None:
    """Why there can be no cluster here."""
    absent = [name for name in PROGRAMS if program(name) is None]
    return f"no {', '.join(absent)} here: apt install slurmctld slurmd slurm-client munge" if absent else None


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class Cluster:
    def __init__(self, folder: Path, nodes: int = 3, down_s: int = 9):
        """`down_s`: how long a node may not answer before it counts as down."""
        self.folder, self.names = folder, [f"n{number}" for number in range(1, nodes + 1)]
        for name in ("state", "munge", "log"):
            (folder / name).mkdir(parents=True, mode=0o700)
        self.socket = folder / "munge" / "munge.socket"
        ports = _free_ports(nodes + 1)
        self.down_s, self.conf = down_s, folder / "slurm.conf"
        self.conf.write_text(self._conf(ports[0], dict(zip(self.names, ports[1:], strict=True))))
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--socket={self.socket}", f"--key-file={key}", f"--pid-file={self.folder}/munge/pid"]
        munge += [f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/munge/seed", "--force"]
        try:
            self._daemon("munged", "munged", "--foreground", *munge)
            _until(self.socket.exists, "munged")
            self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
            for name in self.names:
                self.start(name)
            _until(lambda: self.states() == ["idle"] * len(self.names), "the nodes", self.tell)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError, TimeoutError):  # a dead node keeps its job
            self.run("scancel", "--user", str(os.getuid()))
            _until(lambda: not self.run("squeue", "--noheader").strip(), "the end of all jobs", seconds=20)
        for daemon in reversed(self.daemons.values()):
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        for pid in _with_environment(f"SLURM_CONF={self.conf}", "SLURM_JOB_ID"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def kill(self, node: str) -> None:
        """The node and all that runs on it, at once."""
        self.daemons.pop(node).kill()
        for pid in _with_environment(f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.conf}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in _steps(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: str) -> str:
        path = program(command[0]) or command[0]
        return subprocess.run(
            [path, *command[1:]], env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def states(self) -> list[str]:
        with suppress(subprocess.SubprocessError):
            return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        return []

    def tell(self) -> str:
        """What there is to see when something went wrong."""
        told = []
        for command in (["squeue", "--states=all"], ["scontrol", "show", "job"], ["sinfo", "--Node", "--long"]):
            with suppress(subprocess.SubprocessError):
                told.append(self.run(*command))
        told += [f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in (self.folder / "log").glob("*")]
        return "\n".join(told)

    def _daemon(self, name: str, *command: str) -> None:
        path = program(command[0])
        assert path is not None, command[0]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path, *command[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _conf(self, port: int, nodes: dict[str, int]) -> str:
        own, user = socket.gethostname(), _user()
        lines = [
            "ClusterName=onecurve",
            f"SlurmctldHost={own}(127.0.0.1)",
            f"SlurmctldPort={port}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={self.socket},cred_expire=5",  # a job that queues again waits so long
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            f"SlurmdTimeout={self.down_s}",
            "SlurmctldTimeout=10",
            "KillWait=20",
            "MinJobAge=3600",  # there is no accounting: the queue remembers
            "SchedulerParameters=sched_interval=1,sched_min_interval=1,batch_sched_delay=0,bf_interval=1",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.folder}/log/slurmctld.log",
            f"SlurmdLogFile={self.folder}/log/slurmd-%n.log",
        ]
        lines += [
            f"NodeName={name} NodeHostname={own} NodeAddr=127.0.0.1 Port={number} CPUs={CPUS} RealMemory=8000"
            for name, number in nodes.items()
        ]
        lines.append(f"PartitionName=debug Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"


def _until(happened, what: str, tell=lambda: "", seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}\n{tell()}")
        time.sleep(0.2)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _with_environment(*variables: str) -> list[int]:
    """Processes that have all of these in their environment: `NAME`, or `NAME=value`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            found_names = {part.partition(b"=")[0] for part in environment}
            if all(variable.encode() in (environment if "=" in variable else found_names) for variable in variables):
                found.append(int(folder.name))
    return found


def _steps(node: str) -> list[int]:
    """The slurmstepd processes of the node: they have its log open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_step = b"slurmstepd" in (folder / "cmdline").read_bytes()
            if is_step and any(os.readlink(link).endswith(f"slurmd-{node}.log") for link in (folder / "fd").iterdir()):
                found.append(int(folder.name))
    return found
