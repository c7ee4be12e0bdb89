"""Examines the GPUs of one node with `nvidia-smi`: which they are, whether they are sound, how they are connected."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence

from launch.doctor.verdict import Finding

FIELDS = (
    "index", "name", "driver_version", "memory.total", "memory.used", "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure",
    "clocks_event_reasons.hw_thermal_slowdown", "clocks_event_reasons.hw_power_brake_slowdown",
)  # fmt: skip
PATIENCE_S = 20  # a GPU that fell off the bus can hold nvidia-smi up for ever
BUSY_MIB = 1024  # in use before a job has begun
LINKS = {"NV": "NVLink", "PIX": "one PCIe switch", "PXB": "PCIe switches", "PHB": "a PCIe host bridge",
         "NODE": "PCIe within a NUMA node", "SYS": "between NUMA nodes"}  # fmt: skip
XID = re.compile(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)")
GRAVE = {48, 63, 64, 74, 79, 92, 94, 95, 110, 119, 120}  # memory, NVLink, off the bus, contained errors, GSP


def examine(kernel: str | None = None) -> tuple[list[Finding], dict[str, str]]:
    """Returns findings, and the facts that must be the same on all nodes. `kernel`: a kernel log to read instead."""
    succeeded, text = _run("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    if not succeeded and re.search(r"not a valid field", text):  # an older driver
        succeeded, text = _run("nvidia-smi", f"--query-gpu={','.join(FIELDS[:7])}", "--format=csv,noheader,nounits")
    if not succeeded and text == "not there":
        return [_without_nvidia_smi()], {"GPUs": "none"}
    if not succeeded:
        advice = "reboot the node, or have its driver looked at; `dmesg | grep -i xid` may say more"
        return [Finding("GPU", "bad", f"nvidia-smi failed: {text[:300]}", advice)], {"GPUs": "unknown"}
    findings, facts = judge(text)
    has_topology, topology = _run("nvidia-smi", "topo", "-m")
    if has_topology and (links := connections(topology)):
        findings.append(Finding("GPU", "good", f"pairs of GPUs are connected by {links}"))
    findings += xids(_run("dmesg")[1] if kernel is None else kernel)
    return findings + seen_by_torch(len(text.splitlines())), facts


def judge(text: str) -> tuple[list[Finding], dict[str, str]]:
    """Returns findings and facts. `text`: for each GPU a line of FIELDS; unknown ones are `[N/A]` or absent."""
    rows = [dict(zip(FIELDS, map(str.strip, line.split(",")), strict=False)) for line in text.splitlines() if line]
    names = ", ".join(f"{count} x {name}" for name, count in Counter(row["name"] for row in rows).items())
    driver = rows[0].get("driver_version", "?") if rows else "none"
    findings = [Finding("GPU", "good", f"{names}, driver {driver}")]
    for row in rows:
        gpu = f"GPU {row['index']}"
        ecc, used = _number(row, "ecc.errors.uncorrected.volatile.total"), _number(row, "memory.used")
        if ecc:
            advice = "reset it (`nvidia-smi -r`) or reboot; have it replaced if it happens again"
            findings.append(Finding("GPU", "bad", f"{gpu}: {ecc:.0f} uncorrected memory errors", advice))
        if row.get("remapped_rows.pending") in ("Yes", "1"):
            message = f"{gpu}: memory rows wait to be remapped"
            findings.append(Finding("GPU", "bad", message, "reset it (`nvidia-smi -r`) or reboot the node"))
        if row.get("remapped_rows.failure") in ("Yes", "1"):
            findings.append(Finding("GPU", "bad", f"{gpu}: no rows are left to remap", "have it replaced"))
        if used > BUSY_MIB:
            message = f"{gpu}: {used:.0f} MiB are in use already"
            findings.append(Finding("GPU", "warning", message, "see with `nvidia-smi` whose; end what was left behind"))
        reasons = [reason for reason in FIELDS[9:] if row.get(reason) == "Active"]
        if reasons:
            message = f"{gpu}: slowed down ({', '.join(r.rpartition('hw_')[2] for r in reasons)})"
            findings.append(Finding("GPU", "bad", message, "have its cooling and power looked at"))
    return findings, {"GPUs": names or "none", "driver": driver}


def connections(text: str) -> str:
    """Returns how many pairs of GPUs are connected by which link, from the output of `nvidia-smi topo -m`."""
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    rows = [cells for cells in lines if cells and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells]
    counts: Counter[str] = Counter()
    for number, cells in enumerate(rows):
        counts.update(re.sub(r"\d+$", "", cell) for cell in cells[number + 2 : len(rows) + 1])
    return ", ".join(f"{LINKS.get(kind, kind)} ({count})" for kind, count in counts.most_common())


def xids(kernel: str) -> list[Finding]:
    """Returns the GPU errors (Xid) in the kernel's log since the boot; none where the log may not be read."""
    counts = Counter((device, int(number)) for device, number in XID.findall(kernel))
    findings = []
    for (device, number), count in sorted(counts.items()):
        grave = number in GRAVE
        advice = "reboot the node; have the GPU looked at if it happens again" if grave else "often a program's fault"
        message = f"GPU at {device}: Xid {number}, {count} times since the boot"
        findings.append(Finding("GPU", "bad" if grave else "warning", message, advice))
    return findings


def seen_by_torch(count: int) -> list[Finding]:
    """Checks that torch sees GPUs. `count`: GPUs that nvidia-smi lists."""
    import torch

    if torch.cuda.is_available():
        return []
    reason = "is built without CUDA" if torch.version.cuda is None else f"needs a driver for CUDA {torch.version.cuda}"
    message = f"torch sees none of {count} GPUs: it {reason}, or CUDA_VISIBLE_DEVICES hides them"
    return [Finding("GPU", "bad", message, "install the torch that fits this driver (pytorch.org)")]


def _without_nvidia_smi() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        gpus = ", ".join(f"{count} x {name}" for name, count in names.items())
        return Finding("GPU", "warning", f"{gpus}; there is no nvidia-smi to ask about errors", "install it")
    if torch.version.cuda:
        return Finding("GPU", "good", "none: training on CPUs (this torch could use NVIDIA's)")
    return Finding("GPU", "good", "none: training on CPUs")


def _number(row: dict[str, str], name: str) -> float:
    """Returns 0 where the value is unknown."""
    text = row.get(name, "")
    return float(text) if re.fullmatch(r"[\d.]+", text) else 0.0


def _run(*command: str) -> tuple[bool, str]:
    """Returns whether the command succeeded, and its output."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, errors="replace")
    except FileNotFoundError:
        return False, "not there"
    except subprocess.TimeoutExpired:
        return False, f"no answer within {PATIENCE_S} s"
    return process.returncode == 0, (process.stdout or process.stderr).strip()


def visible() -> Sequence[str]:
    """Returns the GPUs that our processes may use, without importing torch."""
    import os

    succeeded, text = _run("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
    indices = text.split() if succeeded else []
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return indices if visible_devices is None else [name for name in visible_devices.split(",") if name][: len(indices)]
