"""Examines one node: versions, processors, memory, limits, network devices. Nothing is sent, nothing is written."""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.doctor.verdict import Finding
from launch.sizes import size
from trainer import __version__

GIB = 1 << 30
SLOW_IMPORT_S = 30.0


def node_name() -> str:
    """Returns this node's name: Slurm's, else its own host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def software() -> tuple[list[Finding], dict[str, str]]:
    """Imports torch. Returns findings, and the facts that must be the same on all nodes."""
    python = platform.python_version()
    facts = {"python": python, "onecurve": __version__}
    start = time.monotonic()
    try:
        import torch
    except (ImportError, OSError) as error:
        message = f"torch cannot be imported: {' '.join(str(error).split())[:300]}"
        return [Finding("software", "bad", message, "install torch again, for this hardware (pytorch.org)")], facts
    import_s = time.monotonic() - start
    cuda, nccl = torch.version.cuda, "none"
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    facts |= {"torch": str(torch.__version__), "CUDA": cuda or "none", "NCCL": nccl}
    message = f"Python {python}, torch {torch.__version__}, CUDA {cuda or 'none'}, NCCL {nccl}, onecurve {__version__}"
    findings = [Finding("software", "good", message)]
    if import_s > SLOW_IMPORT_S:
        advice = "install the environment on a local disk, or in a container: thousands of small files are read"
        findings.append(Finding("software", "warning", f"importing torch took {import_s:.0f} s", advice))
    return findings, facts


def processors(ranks: int) -> Finding:
    """Checks the CPUs. `ranks`: processes on this node."""
    allowed, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    load = os.getloadavg()[0]
    message = f"{allowed} of {total} CPUs may be used, load {load:.1f}"
    if allowed < ranks:
        advice = "ask for more (Slurm: --cpus-per-task), or start fewer processes"
        return Finding("processors", "warning", f"{message}: fewer than the {ranks} processes", advice)
    if load > 2 * total:
        return Finding("processors", "warning", message, "see with `top` who else computes here")
    return Finding("processors", "good", message)


def memory() -> Finding:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    message = f"{size(free)} of {size(total)} are free"
    if limit := _cgroup_limit():
        message += f", and {size(limit)} allowed to this job"
        free = min(free, limit)
    if free < 2 * GIB:
        return Finding("memory", "warning", message, "end what else runs here, or ask for more (Slurm: --mem=0)")
    return Finding("memory", "good", message)


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):  # none, or `max`
            continue
        if limit < 1 << 50:
            return limit
    return None


def open_files(hard: float, processes: int) -> Finding:
    """Checks the hard limit of open files; a run raises its soft limit by itself. Connections are opened when they are
    used, at worst to all processes of a group; shards and libraries come on top."""
    needed = 512 + processes
    message = f"a process may open {hard:.0f} files"
    if hard >= needed:
        return Finding("limits", "good", message)
    advice = "raise nofile in /etc/security/limits.conf, or LimitNOFILE of slurmd's or the container's service"
    return Finding("limits", "bad", f"{message}: {processes} processes need about {needed}", advice)


def locked_memory(soft: float, rdma: bool) -> Finding:
    message = "locked memory is unlimited" if soft == float("inf") else f"{size(soft)} of memory may be locked"
    if rdma and soft != float("inf"):
        advice = "RDMA needs it: `ulimit -l unlimited`; memlock in limits.conf, LimitMEMLOCK of slurmd's service"
        return Finding("limits", "bad", message, advice)
    return Finding("limits", "good", message + ("" if rdma else " (no RDMA device here that needs it)"))


def shared_memory(total: int, free: int) -> Finding:
    message = f"/dev/shm: {size(free)} of {size(total)} are free"
    if free < GIB:
        advice = "data workers and NCCL use it: docker --ipc=host, --shm-size=8g; Kubernetes: a Memory volume"
        return Finding("limits", "bad" if free < GIB // 16 else "warning", message, advice)
    return Finding("limits", "good", message)


def limits(processes: int) -> list[Finding]:
    """Checks the limits of this process. `processes`: those of the whole run."""
    hard = _number(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    locked = _number(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    findings = [open_files(hard, processes), locked_memory(locked, bool(rdma_ports()))]
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        message, advice = "there is no /dev/shm", "mount one: data workers hand over batches through it"
        return [*findings, Finding("limits", "bad", message, advice)]
    return [*findings, shared_memory(stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize)]


def _number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else float(limit)


def rdma_ports() -> list[tuple[str, str, str]]:
    """Returns (device:port, state, rate) of the InfiniBand, RoCE and EFA ports."""
    ports = []
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        texts = [_text(port / name) for name in ("state", "rate")]
        ports.append((f"{port.parents[1].name}:{port.name}", texts[0].partition(": ")[2] or texts[0], texts[1]))
    return ports


def interconnect(alone: bool) -> list[Finding]:
    """Checks the network devices. `alone`: this is the only node, and nothing leaves it."""
    ports, speeds = rdma_ports(), []
    for path in sorted(Path("/sys/class/net").iterdir()) if Path("/sys/class/net").is_dir() else []:
        if path.name != "lo" and _text(path / "operstate") in ("up", "unknown"):
            speed = _text(path / "speed")
            speeds.append(f"{path.name} {int(speed) / 1000:g} Gbit/s" if speed.isdecimal() else path.name)
    message = f"network devices: {', '.join(speeds) or 'none'}; RDMA: {', '.join(_rates(ports)) or 'none'}"
    findings = [Finding("interconnect", "good", message)]
    if down := [name for name, state, _ in ports if state and state != "ACTIVE"]:
        advice = "have the cable, the switch port and the subnet manager looked at, or leave it out with NCCL_IB_HCA"
        findings.append(Finding("interconnect", "warning", f"not active: {', '.join(down)}", advice))
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if not alone and not interface and (problem := _host_name_problem()):
        # Under torchrun (so under `onecurve submit`) the ranks take the interface that leads to the first node.
        advice = "mend /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; torchrun does without"
        findings.append(Finding("interconnect", "warning", problem, advice))
    return findings


def _rates(ports: list[tuple[str, str, str]]) -> list[str]:
    return [f"{name} {rate}" for name, _, rate in ports]


def _host_name_problem() -> str:
    """Returns why other nodes cannot reach this one by its name, whose address gloo listens at; empty if they can."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return f"its own name, {name}, has no address"
    return f"its own name, {name}, leads to {address}, where other nodes cannot come" if address[:4] == "127." else ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # also raised for a device that is down
        return ""


def examine(ranks: int, processes: int, alone: bool) -> tuple[list[Finding], dict[str, str]]:
    """Returns the findings and facts of this node. `ranks`: processes on it, `processes`: those of all nodes."""
    findings, facts = software()
    facts |= {"processor": platform.machine(), "C library": " ".join(platform.libc_ver())}
    if sys.platform == "linux":
        findings += [processors(ranks), memory(), *limits(processes), *interconnect(alone)]
    return findings, facts
