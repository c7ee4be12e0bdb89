"""What one node is: versions, processors, memory, limits, network devices. Nothing is sent, nothing is written."""

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


def installed(package: str) -> str | None:
    """Its version, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def software() -> tuple[list[Finding], dict[str, str]]:
    """Imports torch. Findings, and what must be the same on all nodes."""
    python = platform.python_version()
    facts = {"python": python, "onecurve": __version__}
    began = time.monotonic()
    try:
        import torch
    except (ImportError, OSError) as error:
        told = f"torch cannot be imported: {' '.join(str(error).split())[:300]}"
        return [Finding("software", "bad", told, "install torch again, for this hardware (pytorch.org)")], facts
    took = time.monotonic() - began
    cuda, nccl = torch.version.cuda, "none"
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    facts |= {"torch": str(torch.__version__), "CUDA": cuda or "none", "NCCL": nccl}
    told = f"Python {python}, torch {torch.__version__}, CUDA {cuda or 'none'}, NCCL {nccl}, onecurve {__version__}"
    findings = [Finding("software", "good", told)]
    if took > SLOW_IMPORT_S:
        advice = "install the environment on a local disk, or in a container: thousands of small files are read"
        findings.append(Finding("software", "warning", f"importing torch took {took:.0f} s", advice))
    return findings, facts


def processors(ranks: int) -> Finding:
    """`ranks`: processes on this node."""
    mine, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    load = os.getloadavg()[0]
    told = f"{mine} of {all_of_them} CPUs may be used, load {load:.1f}"
    if mine < ranks:
        advice = "ask for more (Slurm: --cpus-per-task), or start fewer processes"
        return Finding("processors", "warning", f"{told}: fewer than the {ranks} processes", advice)
    if load > 2 * all_of_them:
        return Finding("processors", "warning", told, "see with `top` who else computes here")
    return Finding("processors", "good", told)


def memory() -> Finding:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    told = f"{size(free)} of {size(total)} are free"
    if limit := _cgroup_limit():
        told += f", and {size(limit)} allowed to this job"
        free = min(free, limit)
    if free < 2 * GIB:
        return Finding("memory", "warning", told, "end what else runs here, or ask for more (Slurm: --mem=0)")
    return Finding("memory", "good", told)


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
    """Connections are opened when they are used: to a few others in most groups, to everybody in one at worst. Shards
    and libraries come on top. A run raises its soft limit by itself."""
    needed = 512 + processes
    told = f"a process may open {hard:.0f} files"
    if hard >= needed:
        return Finding("limits", "good", told)
    way = "raise nofile in /etc/security/limits.conf, or LimitNOFILE of slurmd's or the container's service"
    return Finding("limits", "bad", f"{told}: {processes} processes need about {needed}", way)


def locked_memory(soft: float, rdma: bool) -> Finding:
    told = "locked memory is unlimited" if soft == float("inf") else f"{size(soft)} of memory may be locked"
    if rdma and soft != float("inf"):
        advice = "RDMA needs it: `ulimit -l unlimited`; memlock in limits.conf, LimitMEMLOCK of slurmd's service"
        return Finding("limits", "bad", told, advice)
    return Finding("limits", "good", told + ("" if rdma else " (no RDMA device here that needs it)"))


def shared_memory(total: int, free: int) -> Finding:
    told = f"/dev/shm: {size(free)} of {size(total)} are free"
    if free < GIB:
        advice = "data workers and NCCL use it: docker --ipc=host, --shm-size=8g; Kubernetes: a Memory volume"
        return Finding("limits", "bad" if free < GIB // 16 else "warning", told, advice)
    return Finding("limits", "good", told)


def limits(processes: int) -> list[Finding]:
    """`processes`: of the whole run."""
    hard = _number(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    locked = _number(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    findings = [open_files(hard, processes), locked_memory(locked, bool(rdma_ports()))]
    try:
        there = os.statvfs("/dev/shm")
    except OSError:
        told, advice = "there is no /dev/shm", "mount one: data workers hand over batches through it"
        return [*findings, Finding("limits", "bad", told, advice)]
    return [*findings, shared_memory(there.f_blocks * there.f_frsize, there.f_bavail * there.f_frsize)]


def _number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else float(limit)


def rdma_ports() -> list[tuple[str, str, str]]:
    """(device:port, state, rate) of InfiniBand, RoCE and EFA."""
    found = []
    for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*")):
        texts = [_text(port / name) for name in ("state", "rate")]
        found.append((f"{port.parents[1].name}:{port.name}", texts[0].partition(": ")[2] or texts[0], texts[1]))
    return found


def interconnect(alone: bool) -> list[Finding]:
    """`alone`: this is the only node, and nothing leaves it."""
    ports, speeds = rdma_ports(), []
    for path in sorted(Path("/sys/class/net").iterdir()) if Path("/sys/class/net").is_dir() else []:
        if path.name != "lo" and _text(path / "operstate") in ("up", "unknown"):
            speed = _text(path / "speed")
            speeds.append(f"{path.name} {int(speed) / 1000:g} Gbit/s" if speed.isdecimal() else path.name)
    told = f"network devices: {', '.join(speeds) or 'none'}; RDMA: {', '.join(_rates(ports)) or 'none'}"
    findings = [Finding("interconnect", "good", told)]
    if down := [name for name, state, _ in ports if state and state != "ACTIVE"]:
        advice = "have the cable, the switch port and the subnet manager looked at, or leave it out with NCCL_IB_HCA"
        findings.append(Finding("interconnect", "warning", f"not active: {', '.join(down)}", advice))
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if not alone and not chosen and (problem := _own_name()):
        # Under torchrun (so under `onecurve submit`) the ranks take the interface that leads to the first node.
        advice = "mend /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; torchrun does without"
        findings.append(Finding("interconnect", "warning", problem, advice))
    return findings


def _rates(ports: list[tuple[str, str, str]]) -> list[str]:
    return [f"{name} {rate}" for name, _, rate in ports]


def _own_name() -> str:
    """Why other nodes would not find this one under its name: gloo listens where that leads. Empty if they would."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return f"its own name, {name}, has no address"
    return f"its own name, {name}, leads to {address}, where other nodes cannot come" if address[:4] == "127." else ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # also of a device that is down
        return ""


def examine(ranks: int, processes: int, alone: bool) -> tuple[list[Finding], dict[str, str]]:
    """All of this node: findings and facts. `ranks`: processes here, `processes`: of all nodes."""
    findings, facts = software()
    facts |= {"processor": platform.machine(), "C library": " ".join(platform.libc_ver())}
    if sys.platform == "linux":
        findings += [processors(ranks), memory(), *limits(processes), *interconnect(alone)]
    return findings, facts
